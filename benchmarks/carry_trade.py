"""What a device's memory is best spent on under the rule `carry`: rank to train, or components to carry.

`python -m benchmarks.carry_trade`; it lives in benchmarks/carry/trade.py.
"""

import sys

from benchmarks.carry.trade import main

if __name__ == "__main__":
    sys.exit(main())
