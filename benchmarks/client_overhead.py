"""What the agent costs: a training step through it against the same step in a bare PEFT loop.

`python -m benchmarks.client_overhead`; it lives in benchmarks/device/client_overhead.py.
"""

import sys

from benchmarks.device.client_overhead import main

if __name__ == "__main__":
    sys.exit(main())
