"""Scheduling priority. An application's own threads keep theirs: only what trains steps back.

On Linux niceness belongs to a thread, and threads that it starts inherit it, torch's workers among them. On
Windows, macOS and BSD it belongs to the process: there an embedding application decides for itself, and
`lower_thread` does nothing.
"""

from __future__ import annotations

import os
import sys
import threading

import psutil


def lower_thread(niceness: int) -> bool:
    """Give the calling thread this niceness unless it has a higher one; False where threads have none."""
    if sys.platform != "linux":
        return False
    thread = threading.get_native_id()
    if os.getpriority(os.PRIO_PROCESS, thread) < niceness:
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
    return True


def lower_process(niceness: int) -> None:
    """Do it for a process that does nothing but train. To be called before it starts threads."""
    if niceness <= 0 or lower_thread(niceness):
        return
    process = psutil.Process()
    if sys.platform == "win32":
        process.nice(psutil.IDLE_PRIORITY_CLASS if niceness > 10 else psutil.BELOW_NORMAL_PRIORITY_CLASS)
    elif process.nice() < niceness:
        process.nice(niceness)
