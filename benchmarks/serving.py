"""Making a version's files: all ranks of a ladder in one pass, against one by one, and against writing alone.

`python -m benchmarks.serving`; it lives in benchmarks/wire/serving.py.
"""

import sys

from benchmarks.wire.serving import main

if __name__ == "__main__":
    sys.exit(main())
