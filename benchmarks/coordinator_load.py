"""A coordinator under load: the paper's 1,613 devices taking part, then 10,000 that mostly wait.

`python -m benchmarks.coordinator_load`; it lives in benchmarks/load/coordinator_load.py.
"""

import sys

from benchmarks.load.coordinator_load import main

if __name__ == "__main__":
    sys.exit(main())
