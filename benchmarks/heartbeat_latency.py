"""How long a heartbeat waits while the coordinator aggregates: p50, p99 and the longest, against an idle one.

`python -m benchmarks.heartbeat_latency`; it lives in benchmarks/load/heartbeat_latency.py.
"""

import sys

from benchmarks.load.heartbeat_latency import main

if __name__ == "__main__":
    sys.exit(main())
