"""Measurements that take hours: each is on disk before the next begins, so a run that was stopped goes on.

A log holds one JSON object a line. The first line says what was measured and how; each further line is a case
and its result:

    {"benchmark": "rules", "settings": {"steps": 10, ...}, "machine": {"cpu": "...", "threads": "1"}}
    {"case": {"mix": "all 2", "way": "carry", "seed": 0}, "result": {...}}
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.command import machine
from edge_sdk.core.errors import InputError

LOG_HELP = "a JSON line for each result; goes on where it was stopped"

Case = Mapping[str, Any]
"""What tells one measurement from all others of its benchmark: anything that JSON can hold."""


class Results:
    """What is known already, and a log of it.

    Args:
        path: of the log; None keeps results in memory alone.
        benchmark: which one measures. A log of another one is refused.
        settings: all that results depend on and that no case names. A log of other settings is refused.

    Raises:
        InputError: the log is of another benchmark, of other settings, or damaged; names what is wrong.
    """

    def __init__(self, path: Path | None, benchmark: str, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        self._head = {"benchmark": benchmark, "settings": json.loads(json.dumps(settings))}
        if path and path.exists():
            self._read(path)

    def find(self, case: Case) -> Any | None:
        """The result of `case`, if it is known."""
        return self._known.get(_key(case))

    def get(self, case: Case, work: Callable[[], Any]) -> Any:
        """The result of `case`, by `work` unless it is known: as JSON gives it back, in either case."""
        key = _key(case)
        if key not in self._known:
            line = json.dumps({"case": case, "result": work()})
            self._add(line)
            self._known[key] = json.loads(line)["result"]
        return self._known[key]

    def _add(self, line: str) -> None:
        """Append a line, after the head if it is the first."""
        if not self._path:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(json.dumps({**self._head, "machine": machine()}) + "\n")
            file.write(line + "\n")

    def _read(self, path: Path) -> None:
        """Take up what a log holds. A last line without its end, which a run that died was writing, goes."""
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        lines = _objects(path, whole.decode("utf-8"))
        head = next(lines, None)
        if head is None:
            return
        for what, wanted in self._head.items():
            if head.get(what) != wanted:
                found = json.dumps(head.get(what))
                raise InputError(f"{path}: {what} {found}, not {json.dumps(wanted)}; choose another file")
        for row in lines:
            self._known[_key(row["case"])] = row["result"]


def opened(
    parser: argparse.ArgumentParser, path: Path | None, benchmark: str, settings: Mapping[str, Any]
) -> Results:
    """A log of results that a run goes on with; where it cannot be, the command ends and says why."""
    try:
        return Results(path, benchmark, settings)
    except InputError as error:
        parser.error(str(error))


def _objects(path: Path, text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a log; after the first, each has `case` and `result`.

    Raises:
        InputError: a line is something else; names the line.
    """
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON ({error}); take the line out to go on") from error
        if not isinstance(row, dict) or (number > 1 and not {"case", "result"} <= row.keys()):
            raise InputError(f"{path}:{number}: not a case with its result; take the line out to go on")
        yield row


def _key(case: Case) -> str:
    """Of equal cases the same, whether they come from Python or from JSON."""
    return json.dumps(case, sort_keys=True)


def spread(values: Sequence[float]) -> str:
    """Mean and range: 0.081 (0.079 to 0.084)."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"
