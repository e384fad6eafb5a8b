"""Only one file prints and logs, so that no text of a stranger reaches a terminal as it came."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HERE = "edge_sdk/system/terminal.py"
# These write to another program of ours through a pipe, or print what is in our own code alone.
BY_PIPE = {
    "edge_sdk/trials/step_times.py",
    "edge_sdk/trials/step_times_child.py",
    "edge_sdk/trials/library_memory_child.py",
    "edge_sdk/trials/four_bit_child.py",
    "coordinator/engine/diagram.py",
}
SILENCES = {"edge_sdk/model/base_model.py"}  # a library's advice
LOGGING = {"getLogger", "basicConfig", "StreamHandler", "FileHandler", "addHandler"}
OTHERS = {"warnings.warn", "tqdm.write", "traceback.print_exc", "sys.stdout.write", "sys.stderr.write"}


def files() -> list[str]:
    found = (path for folder in ("edge_sdk", "coordinator") for path in (ROOT / folder).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def ways_out(source: str) -> Iterator[str]:
    """What a file calls that shows text to somebody."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "print" or called in OTHERS or called.rpartition(".")[2] in LOGGING:
                yield called


def test_ways_out_are_found() -> None:
    source = "print(1)\nsys.stderr.write(x)\nlogging.getLogger()\nlog.addHandler(h)\nwarnings.warn(x)\n"
    assert len(list(ways_out(source))) == 5


@pytest.mark.parametrize("name", files())
def test_no_other_file_prints_or_logs(name: str) -> None:
    found = list(ways_out((ROOT / name).read_text(encoding="utf-8")))
    if name in SILENCES:
        assert set(found) <= {"logging.getLogger"}
    elif name not in BY_PIPE | {HERE}:
        assert found == []
