"""Settings of the whole suite."""

from __future__ import annotations

import os

from hypothesis import settings

# Before any test imports torch: processes that each take every core run many times slower together.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples on every run, and no time limit on one: machines that run tests are shared.
# `pytest --hypothesis-profile=explore` draws new ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("same")
