"""Settings of the whole suite."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before any test imports torch: processes that each take every core run many times slower together.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples on every run, and no time limit on one: machines that run tests are shared.
# `pytest --hypothesis-profile=explore` draws new ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def cache() -> Iterator[Path]:
    """A cache folder for this run: devices learn nothing from earlier runs, and share one 4-bit trial."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        yield Path(folder) / "edge-sdk"
