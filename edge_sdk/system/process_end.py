"""How a process ended, in words: what its exit code means, and whether that speaks of memory."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from edge_sdk.system.out_of_memory import said

# NTSTATUS values that Windows reports as exit codes: no memory, and none left that could be committed.
WINDOWS_NO_MEMORY = {0xC0000017, 0xC000012D}


@dataclass(frozen=True)
class Ending:
    """Why a process that was not told to end did. `memory`: it was lack of memory, as far as can be told."""

    reason: str
    memory: bool


def ending_of(code: int, stderr: str) -> Ending:
    """What an exit code (negative: a signal) and the last lines of standard error say.

    A native library that finds no memory prints so and calls `exit` (bitsandbytes) or `abort` (C++).
    """
    lines = [line.strip() for line in stderr.replace("\r", "\n").splitlines() if line.strip()]
    last = f"; its last words: {lines[-1][:200]}" if lines else ""
    if code == -getattr(signal, "SIGKILL", 9):
        return Ending("killed by the system, probably out of memory", memory=True)
    if code < 0:
        how = f"ended by signal {_signal_name(-code)}"
    elif code in WINDOWS_NO_MEMORY:
        return Ending("ended by the system, out of memory", memory=True)
    else:
        how = f"exit code {code}"
    return Ending(how + last, memory=code != 0 and any(said(line) for line in lines))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
