"""The worker that a device trains with: in a process of its own, or in the application's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk.core.messages import Federation
from edge_sdk.options import Options
from edge_sdk.participation import decision as enrolment
from edge_sdk.participation.decision import Decision
from edge_sdk.worker.messages import Setup

if TYPE_CHECKING:
    from edge_sdk.participation.resident_model import Trainee


def worker_for(
    federation: Federation, options: Options, data: Path | None, decision: Decision | None
) -> Trainee:
    """A worker with the base loaded. `decision`: how the device trains; None for one that only answers.

    Raises:
        InputError, OutOfMemory, WorkerDied: as `WorkerProcess.prepare`.
    """
    setup = Setup(
        model=enrolment.model_of(federation, options),
        modules=federation.base.modules,
        scaling=federation.scaling,
        upload_dtype=federation.upload_dtype,
        data=str(data) if data else None,
        device=options.device,
        quantise=decision.quantise if decision else options.quantise,
        bitsandbytes=decision.bitsandbytes if decision else True,
        threads=options.threads,
        niceness=options.nice,
        progress=options.progress if options.progress is not None else sys.stderr.isatty(),
        alone=options.isolate,
    )
    return _in_a_process(setup) if options.isolate else _in_this_process(setup)


def _in_a_process(setup: Setup) -> Trainee:
    """A worker in a process of its own; if it cannot be made, none is left behind."""
    from edge_sdk.worker.process import WorkerProcess

    worker = WorkerProcess(setup)
    try:
        worker.prepare()
    except BaseException:
        worker.close()
        raise
    return worker


def _in_this_process(setup: Setup) -> Trainee:
    """A worker that shares the application's process, its libraries and its fate."""
    from edge_sdk.worker.worker import Worker

    return Worker(setup)
