"""Buffered against synchronous federations: time to a fixed held-out loss, with unlike devices and drop-outs.

`python -m benchmarks.async_vs_sync`; it lives in benchmarks/asynchrony/comparison.py.
"""

import sys

from benchmarks.asynchrony.comparison import main

if __name__ == "__main__":
    sys.exit(main())
