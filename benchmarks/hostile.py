"""Whether hostile connections harm the others: heartbeats of 500 good devices beside 30 % that only cost.

`python -m benchmarks.hostile`; it lives in benchmarks/load/hostile.py.
"""

import sys

from benchmarks.load.hostile import main

if __name__ == "__main__":
    sys.exit(main())
