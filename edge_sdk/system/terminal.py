"""The one place that prints and logs: whatever a line says comes out as one harmless line.

`edge_sdk.core.words` says what harmless is. A character that the output's encoding does not have becomes an
escape, and a reader that has gone (`… | head`) ends nothing. Needs Python alone.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from edge_sdk.core.errors import EdgeError
from edge_sdk.core.words import printable, printable_lines
from edge_sdk.system.durable import private

MOST = 4000  # characters of a line on the terminal or in a log
_CURSOR_UP = "\x1b[A"  # how a progress bar goes back to the line of another


def run_command(name: str, command: Callable[[], int]) -> int:
    """Run a command to its exit code: 2 on an EdgeError, which is said in one line, and 130 on Ctrl-C.

    The files that it makes are its user's alone, and no character keeps it from printing a line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with private():
            return command()
    except EdgeError as error:
        complain(f"{name}: {error}")
        return 2
    except KeyboardInterrupt:
        return 130


def say(*lines: str) -> None:
    """Print lines on standard output, at once."""
    _write(sys.stdout, "".join(printable(line, MOST) + "\n" for line in lines))


def say_text(text: str, head: str = "") -> None:
    """Print a text of several lines that ends with its own line break, such as a document.

    `head`: before it, as it is, for a word of ours in colour.
    """
    _write(sys.stdout, head + printable_lines(text))


def write_text(stream: TextIO, text: str) -> None:
    """Write a piece of text in which lines end and tabs stand, as an answer of a model has them."""
    _write(stream, printable_lines(text))


def complain(*lines: str) -> None:
    """Print lines on standard error."""
    _write(sys.stderr, "".join(printable(line, MOST) + "\n" for line in lines))


def pass_on(text: str) -> None:
    """Print on standard error what another process of ours printed there, with its progress bars."""
    kept = ["\r".join(map(printable_lines, part.split("\r"))) for part in text.split(_CURSOR_UP)]
    _write(sys.stderr, _CURSOR_UP.join(kept))


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # a windowed application
        return
    try:
        _write_what_can_be(stream, text)
        stream.flush()
    except BrokenPipeError:  # nobody reads any more; that is no reason to stop
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _write_what_can_be(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


# --- logs -----------------------------------------------------------------------------------------


class Log(logging.LoggerAdapter[logging.Logger]):
    """A logger whose messages are one harmless line each, whoever handles them."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """As `logging.Logger.log`."""
        if self.isEnabledFor(level):
            text = str(msg) % args if args else str(msg)
            self.logger.log(level, "%s", printable(text, MOST), stacklevel=2, **kwargs)


def logger(name: str) -> Log:
    """The logger of this name."""
    return Log(logging.getLogger(name))


class OneLine(logging.Formatter):
    """Every record in one harmless line. A traceback, which only a bug of ours has, follows set in."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The record's own line."""
        return printable(super().formatMessage(record), MOST)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """What the error says may have lines too, and none of them looks like one of the log's own."""
        text = printable_lines(super().formatException(ei))
        return "\n".join(f"  | {line}" for line in text.split("\n"))


class _ToTerminal(logging.Handler):
    """Writes records to standard error as it is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _write(sys.stderr, self.format(record) + "\n")
        except Exception:  # noqa: BLE001 - as every handler does: a log ends nobody's work
            self.handleError(record)


def log_to_terminal(level: int = logging.INFO) -> None:
    """Have the log of this process on standard error, a time and one line for each record."""
    handler = _ToTerminal()
    handler.setFormatter(OneLine("%(asctime)s  %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler])
