"""Runs Python code in a process of its own, and says in words how it ended, crashes included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

from edge_sdk.core.errors import InputError

# What Windows reports in place of a signal (NTSTATUS values of its documentation).
WINDOWS_CRASHES = {0xC0000005: "access violation", 0xC000001D: "illegal instruction", 0xC0000409: "abort"}


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
    return Outcome(tuple(done.stdout.splitlines()), _failure(done.returncode, done.stderr))


def _failure(code: int, stderr: str) -> str:
    """Why a process that ended with `code` failed: the signal, or the last line of its traceback."""
    if code == 0:
        return ""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"the process was killed by {name} ({signal.strsignal(-code) or 'unknown'})"
    if code & 0xFFFFFFFF in WINDOWS_CRASHES:
        return f"the process crashed: {WINDOWS_CRASHES[code & 0xFFFFFFFF]}"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"exit code {code}"
