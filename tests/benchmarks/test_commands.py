"""The commands of `benchmarks`: all that the documents name are there, answer, and stand in the list."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as catalogue

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"python -m benchmarks\.([\w.]+\w)")
COMMANDS = catalogue.commands()


def named_in_documents() -> dict[str, str]:
    """Command -> a document that names it."""
    named: dict[str, str] = {}
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "Makefile"]:
        found = COMMAND.findall(path.read_text(encoding="utf-8"))
        named |= dict.fromkeys(found, path.name)
    return named


def test_every_command_of_the_documents_is_there() -> None:
    named = named_in_documents()
    assert {"aggregation", "client_overhead", "coordinator_load"} <= set(named)
    assert {name: place for name, place in named.items() if name not in COMMANDS} == {}


def test_every_command_that_a_docstring_names_is_there() -> None:
    folders = ("benchmarks", "coordinator", "edge_sdk", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    named = {name for path in files for name in COMMAND.findall(path.read_text(encoding="utf-8"))}
    assert set(COMMANDS) <= named
    others = named - set(COMMANDS) - {"NAME"}  # what a command starts as a process of its own
    assert others == {"aggregation.child", "load.hostile_peers", "load.sink"}
    assert all(importlib.util.find_spec(f"benchmarks.{name}") for name in others)


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    found = importlib.import_module(f"benchmarks.{name}")
    if not hasattr(found, "main"):
        found = importlib.import_module(f"benchmarks.{name}.__main__")
    with pytest.raises(SystemExit) as ended:
        found.main(["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of(name, capsys)
    assert said.startswith(f"usage: python -m benchmarks.{name} ")
    assert COMMANDS[name] in said  # a thin file says what the benchmark itself says


@pytest.mark.parametrize("name", ["carry_trade", "poisoning", "privacy", "wire_dtypes"])
def test_the_log_has_its_former_name_too(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--log LOG, --json LOG" in help_of(name, capsys)


def test_the_list_holds_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    catalogue.main()
    said = capsys.readouterr().out.splitlines()
    assert said[::2] == [f"python -m benchmarks.{name}" for name in COMMANDS]
    assert all(line.strip().endswith(".") for line in said[1::2])
