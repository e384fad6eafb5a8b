"""What is printed and logged: one harmless line each, in any encoding, whether or not anybody reads it."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk.core.errors import InputError
from edge_sdk.system import terminal
from tests.coordinator.devices import configuration, member
from tests.processes import CoordinatorProcess, environment

FORGED = "x) joined\n00:00:00  version 99: 1000 updates\x1b[8m\u202e"
SHOWN = r"x) joined\n00:00:00  version 99: 1000 updates\x1b[8m\u202e"
NAME = "书房"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a coordinator that runs, with a device whose name few encodings have."""
    folder = tmp_path_factory.mktemp("coordinator")
    with CoordinatorProcess(folder, configuration(folder)) as coordinator:
        with member(coordinator, NAME):
            pass
        yield coordinator.data


# --- lines ----------------------------------------------------------------------------------------


def test_what_is_said_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say(FORGED, "second")
    terminal.complain(FORGED)
    said = capsys.readouterr()
    assert said.out == f"{SHOWN}\nsecond\n"
    assert said.err == f"{SHOWN}\n"


def test_a_document_keeps_its_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say_text("a\n\tb\x1b[8m\n", head="\x1b[32m✓\x1b[0m")
    assert capsys.readouterr().out == "\x1b[32m✓\x1b[0ma\n\tb\\x1b[8m\n"


def test_progress_bars_of_another_process_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.pass_on("\r 50 %\r100 %\x1b[A\x1b[2J\n")
    assert capsys.readouterr().err == "\r 50 %\r100 %\x1b[A\\x1b[2J\n"


def test_an_error_is_one_line_and_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        raise InputError(FORGED)

    assert terminal.run_command("edge-sdk", fails) == 2
    assert capsys.readouterr().err == f"edge-sdk: {SHOWN}\n"


# --- logs -----------------------------------------------------------------------------------------


def formatted(message: str, *arguments: object, error: BaseException | None = None) -> str:
    made = logging.LogRecord(
        "x", logging.INFO, "x.py", 1, message, arguments, (type(error), error, None) if error else None
    )
    return terminal.OneLine("%(levelname)s  %(message)s").format(made)


def test_a_record_is_one_line_also_where_a_library_logs_it() -> None:
    assert formatted("device %s", FORGED) == f"INFO  device {SHOWN}"


def test_a_traceback_follows_set_in_and_none_of_its_lines_looks_like_a_record() -> None:
    first, *others = formatted("failed", error=ValueError(FORGED)).split("\n")
    assert first == "INFO  failed"
    assert all(line.startswith("  | ") for line in others)
    assert "\x1b" not in "".join(others)


def test_a_logger_of_ours_gives_one_line_to_whoever_handles_it(caplog: pytest.LogCaptureFixture) -> None:
    terminal.logger("edge_sdk.test").warning("device %s joined", FORGED)
    assert caplog.messages == [f"device {SHOWN} joined"]
    assert caplog.records[0].filename == Path(__file__).name


# --- encodings ------------------------------------------------------------------------------------


def printed(encoding: str, *arguments: object) -> tuple[int, str]:
    """Exit code and output of a command; its standard error has no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env=environment() | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=60.0,
        check=False,
    )
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.decode(encoding.partition(":")[0])


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437:strict", "utf-8"])
def test_a_name_that_the_output_cannot_show_becomes_escapes(data: Path, encoding: str) -> None:
    code, said = printed(encoding, "coordinator.cli", "status", "--data", data)
    assert code == 0
    assert (NAME if encoding == "utf-8" else r"\u4e66\u623f") in said


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize(
    "arguments",
    [("doctor", "--device", "cpu"), ("profile", "--model", "tiny", "--profile", "rtx-3060-12gb")],
    ids=lambda arguments: arguments[0],
)
def test_commands_of_a_device_in_an_encoding_without_their_signs(
    arguments: tuple[str, ...], encoding: str
) -> None:
    code, said = printed(encoding, "edge_sdk.cli", *arguments)
    assert code in (0, 1)
    assert "\n" in said


def test_a_stream_that_an_application_gave_is_written_to_in_its_encoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(given, "ascii", write_through=True))
    terminal.say(NAME)
    assert given.getvalue() == rb"\u4e66\u623f" + b"\n"


def test_a_windowed_application_has_no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    terminal.say("x")
    terminal.complain("x")


# --- readers that have gone -----------------------------------------------------------------------


def to_a_reader_of_one_line(*arguments: object) -> tuple[int, str]:
    """Exit code and standard error of a command of which `head -1` reads the output."""
    script = '"$@" | head -1 >/dev/null; echo "${PIPESTATUS[0]}"'
    program = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(
        ["bash", "-c", script, "bash", *program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60.0,
        check=True,
    )
    return int(done.stdout), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell with pipes")
def test_a_reader_that_goes_after_one_line_ends_nothing(data: Path) -> None:
    assert to_a_reader_of_one_line("coordinator.cli", "status", "--data", data) == (0, "")
    code, complaint = to_a_reader_of_one_line("edge_sdk.cli", "doctor", "--device", "cpu")
    assert code in (0, 1)
    assert complaint == ""
