"""What rounding on the wire loses, without training: block sizes of int8, and error feedback.

`python -m benchmarks.wire_rounding`; it lives in benchmarks/wire/rounding.py.
"""

import sys

from benchmarks.wire.rounding import main

if __name__ == "__main__":
    sys.exit(main())
