"""What an agent works with, and may be given others of: the clock, the worker, the measurements."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edge_sdk.conditions import Conditions, Surroundings
from edge_sdk.core.messages import Federation
from edge_sdk.machine.surroundings import Observer
from edge_sdk.options import Options
from edge_sdk.participation.decision import Decision
from edge_sdk.participation.resident_model import Trainee, worker_for

MakeWorker = Callable[[Federation, Options, Path | None, Decision | None], Trainee]


@dataclass(frozen=True)
class Collaborators:
    """What `Agent` uses of the world around it; the defaults are those of a real device.

    An application that trains or measures in a way of its own passes others, and so do tests.

    Args:
        clock: seconds that never go back. Waits, heartbeats and what is still fresh are counted by it.
        make_worker: makes the worker that trains and answers, with the base loaded; see `worker_for`.
        measure: what the owner's conditions ask about, at this moment.
    """

    clock: Callable[[], float] = time.monotonic
    make_worker: MakeWorker = worker_for
    measure: Callable[[Conditions], Surroundings] = field(default_factory=lambda: Observer().look)
