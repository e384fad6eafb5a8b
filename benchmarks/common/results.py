"""Measurements that take hours: kept in a file after each, and gone on with where they were stopped."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Results:
    """Numbers by key, written after each, so that a run that was stopped goes on where it was."""

    def __init__(self, path: Path | None, machine: dict[str, Any]) -> None:
        self._path = path
        self.rows: dict[str, Any] = {}
        if path and path.exists():
            self.rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        self._machine = machine

    def get(self, key: str, work: Callable[[], Any]) -> Any:
        """The number of `key`, worked out if it is not there."""
        if key not in self.rows:
            self.rows[key] = work()
            if self._path:
                text = json.dumps({"machine": self._machine, "rows": self.rows}, indent=1)
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.write_text(text + "\n", encoding="utf-8")
        return self.rows[key]


def spread(values: Sequence[float]) -> str:
    """Mean and range: 0.081 (0.079 to 0.084)."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"
