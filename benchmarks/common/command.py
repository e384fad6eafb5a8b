"""What the commands of `benchmarks` do alike: their parser, their console, the file for programs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.machine.processor import cpu_name

if TYPE_CHECKING:
    from rich.console import Console


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`, whose --help is the module's docstring."""
    shown = f"python -m benchmarks.{name}"
    raw = argparse.RawTextHelpFormatter
    return argparse.ArgumentParser(prog=shown, description=doc, formatter_class=raw)


def console(width: int) -> Console:
    """As wide as the terminal; `width` characters where the output goes to a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width)


def machine() -> dict[str, Any]:
    """What ran a measurement: the processor, and how many compute threads the environment allows."""
    return {"cpu": cpu_name(), "threads": os.environ.get("OMP_NUM_THREADS", "all")}


def write_json(path: Path | None, document: Any) -> None:
    """Write what was measured, if a file was asked for; its folder is made."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
