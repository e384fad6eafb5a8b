"""Predicted against measured time of real training steps, over a grid of models and settings.

`python -m benchmarks.time_model`; it lives in benchmarks/device/time_model.py.
"""

import sys

from benchmarks.device.time_model import main

if __name__ == "__main__":
    sys.exit(main())
