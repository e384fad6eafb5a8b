"""Runs Python code in a process of its own, and says in words how a process ended, crashes included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

from edge_sdk.core.errors import InputError
from edge_sdk.system.out_of_memory import said

# What Windows reports in place of a signal (NTSTATUS values of its documentation): crashes, and the lack of
# memory, or of memory that could be committed.
NO_MEMORY = "out of memory"
WINDOWS_CRASHES = {0xC0000005: "access violation", 0xC000001D: "illegal instruction", 0xC0000409: "abort"}
WINDOWS_CRASHES |= {0xC0000017: NO_MEMORY, 0xC000012D: NO_MEMORY}


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its output lines, and why it failed ("" where it exited with 0)."""

    lines: tuple[str, ...]
    failure: str


def run_python(*arguments: str, timeout_s: float) -> Outcome:
    """Run `python arguments`, with the modules that this process would import and one compute thread.

    Raises:
        InputError: this application is frozen into one executable, which is no interpreter to start.
    """
    if getattr(sys, "frozen", False) or not sys.executable:
        raise InputError("this application has no Python interpreter of its own to start a trial in")
    paths = [path or str(os.getcwd()) for path in sys.path]  # noqa: PTH109  os.pathsep joins strings
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", *arguments],  # -P: what lies in the current folder is no library
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        lines = error.stdout.decode(errors="replace").splitlines() if isinstance(error.stdout, bytes) else []
        return Outcome(tuple(lines), f"did not end within {timeout_s:.0f} s")
    return Outcome(tuple(done.stdout.splitlines()), failure_of(done.returncode, done.stderr))


def failure_of(code: int, stderr: str) -> str:
    """Why a process that ended with `code` failed: the signal, or the last line of its traceback."""
    if code == 0:
        return ""
    if code < 0:
        return f"the process was killed by {_signal_name(-code)} ({signal.strsignal(-code) or 'unknown'})"
    if crash := _crash(code):
        return f"the process crashed: {crash}"
    return _last_words(stderr) or f"exit code {code}"


@dataclass(frozen=True)
class Ending:
    """Why a process that was not told to end did. `memory`: it was lack of memory, as far as can be told."""

    reason: str
    memory: bool


def ending_of(code: int, stderr: str) -> Ending:
    """What an exit code (negative: a signal) and the last lines of standard error say.

    A native library that finds no memory prints so and calls `exit` (bitsandbytes) or `abort` (C++).
    """
    if code == -getattr(signal, "SIGKILL", 9):
        return Ending("killed by the system, probably out of memory", memory=True)
    if code < 0:
        how = f"ended by signal {_signal_name(-code)}"
    elif (crash := _crash(code)) == NO_MEMORY:
        return Ending("ended by the system, out of memory", memory=True)
    else:
        how = f"crashed: {crash}" if crash else f"exit code {code}"
    last = _last_words(stderr)
    memory = code != 0 and any(said(line) for line in _lines(stderr))
    return Ending(f"{how}; its last words: {last}" if last else how, memory)


def _crash(code: int) -> str:
    """What Windows calls an exit code of its own, signed or not; "" for one that the program chose."""
    return WINDOWS_CRASHES.get(code & 0xFFFFFFFF, "")


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else str(number)


def _last_words(stderr: str) -> str:
    return next((line[:200] for line in reversed(_lines(stderr))), "")


def _lines(stderr: str) -> list[str]:
    """Lines that say something; a carriage return, as progress bars print it, ends one too."""
    return [line.strip() for line in stderr.replace("\r", "\n").splitlines() if line.strip()]
