"""Predicted against measured peak memory of real training, over a grid of models and settings.

`python -m benchmarks.memory_model`; it lives in benchmarks/device/memory_model.py.
"""

import sys

from benchmarks.device.memory_model import main

if __name__ == "__main__":
    sys.exit(main())
