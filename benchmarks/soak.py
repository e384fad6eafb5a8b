"""Minutes of trouble: stragglers, drop-outs, cut uploads, and a coordinator that is killed again and again.

`python -m benchmarks.soak`; it lives in benchmarks/load/soak.py.
"""

import sys

from benchmarks.load.soak import main

if __name__ == "__main__":
    sys.exit(main())
