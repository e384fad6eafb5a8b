"""What the dtypes of the wire cost in bytes and in learning; and what error feedback is worth.

`python -m benchmarks.wire_dtypes`; it lives in benchmarks/wire/dtypes.py.
"""

import sys

from benchmarks.wire.dtypes import main

if __name__ == "__main__":
    sys.exit(main())
