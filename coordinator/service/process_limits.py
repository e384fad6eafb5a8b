"""What a server asks of the operating system: many connections, and memory given back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from asyncio import sslproto
from concurrent.futures import ThreadPoolExecutor

WANTED_FILES = 16384  # ten thousand devices with a connection each, and room
MMAP_BYTES = 1 << 20  # larger blocks go back to the system when they are freed
TLS_RECORD_BYTES = 16 << 10  # the most that one holds (RFC 8446)
ARENAS = 2  # heaps of glibc; with one a thread, each keeps the most that any thread ever had
THREADS = 32  # for blocking work: most of them wait for the disk, which serves many waits at once
SWITCH_S = 0.001  # how long a thread may keep the interpreter from others; Python's default is 5 ms
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def raise_file_limit(wanted: int = WANTED_FILES) -> str | None:
    """Allow this process as many open files as it may have; a line for the host if those are fewer."""
    if sys.platform == "win32":  # has no such limit
        return None
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid even that
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return None
    return f"at most {soft} open files, so about {soft} connections; for more raise `ulimit -Hn`"


def file_limit() -> int | None:
    """How many files this process may have open at a time; None for no limit."""
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def give_memory_back() -> None:
    """Make glibc return what large arrays leave behind; where there is another C library, nothing."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in (
            (_M_ARENA_MAX, ARENAS),
            (_M_MMAP_THRESHOLD, MMAP_BYTES),
            (_M_TRIM_THRESHOLD, 4 * MMAP_BYTES),
        ):
            mallopt(option, value)


def small_tls_buffers() -> None:
    """Have asyncio keep a record of each TLS connection where it would keep sixteen.

    Otherwise whoever opens ten thousand and says nothing takes 2.8 GB. It is no slower: 600 MB/s either way.
    """
    sslproto.SSLProtocol.max_size = TLS_RECORD_BYTES


def take_turns_often() -> None:
    """Let the event loop have the interpreter soon, whatever worker threads do.

    The search for cycles looks at everything that ten thousand connections are made of; so it looks rarely,
    and never at what is there for good.
    """
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def disk_threads() -> ThreadPoolExecutor:
    """The threads that an event loop hands blocking work to."""
    return ThreadPoolExecutor(THREADS, "disk")
