"""Work on several modules at a time without standing in the way of the server.

Each worker computes on one thread of its own: BLAS is held to one, because modules side by side use every
core and its own threads would only fight with them. The event loop waits for a worker only while that holds
the interpreter's lock, which numpy gives back for every product (`python -m benchmarks.heartbeat_latency`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Processors that this process may use."""
    available = getattr(os, "sched_getaffinity", None)  # Linux: what a container or taskset leaves
    return len(available(0)) if available else os.cpu_count() or 1


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`work` of every item in the order of the items, on `workers` threads.

    No more than `workers` + 1 items are begun before their result is taken, so that memory holds no more.
    The first error ends it, whichever item it comes from, once the results before it are taken.
    """
    waiting: deque[Future[Result]] = deque()
    with (
        threadpool_limits(limits=1, user_api="blas"),
        ThreadPoolExecutor(workers, "aggregation") as pool,
    ):
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
