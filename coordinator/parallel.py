"""Work on several modules at a time without standing in the way of the server.

Each worker computes on one thread of its own: BLAS is held to one, because modules side by side use every
core and its own threads would only fight with them. Workers run at a lower priority than the event loop, so
that a heartbeat need not wait for a matrix product.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")

NICENESS = 10  # Linux alone has a priority for each thread; elsewhere workers run at the server's


def cores() -> int:
    """Processors that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`work` of every item in the order of the items, on `workers` threads.

    No more than `workers` + 1 items are begun before their result is taken, so that memory holds no more.
    The first error ends it, whichever item it comes from, once the results before it are taken.
    """
    waiting: deque[Future[Result]] = deque()
    with (
        threadpool_limits(limits=1, user_api="blas"),
        ThreadPoolExecutor(workers, "aggregation", _give_way) as pool,
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


def _give_way() -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
