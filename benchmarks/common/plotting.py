"""Matplotlib, which no benchmark needs unless it draws."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any


def drawing(path: str) -> Path:
    """The type of an option that asks for a picture; says before hours of work, not after, what it lacks."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError('needs matplotlib: pip install "flexlora-edge[benchmarks]"')
    return Path(path)


def headless_pyplot() -> Any:
    """Matplotlib without a screen, imported only when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
