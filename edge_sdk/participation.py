"""The device's loop: enrol, ask, download, train, upload, deliver, ask …, with pauses where they are due."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk import enrolment, manners
from edge_sdk import session as sessions
from edge_sdk.assignment_run import AssignmentRun
from edge_sdk.callbacks import PAUSED
from edge_sdk.core.choice import RankChoice
from edge_sdk.core.errors import (
    EdgeError,
    InputError,
    NotFound,
    OurFault,
    OutOfMemory,
    StaleUpdate,
    Unreachable,
    WorkerDied,
)
from edge_sdk.core.messages import Ask, NotNow
from edge_sdk.fitting import Fitting
from edge_sdk.membership import Membership
from edge_sdk.published import PublishedAdapters
from edge_sdk.resident import ResidentModel
from edge_sdk.serving import Serving
from edge_sdk.surroundings import Watch
from edge_sdk.transport import TransferStopped
from edge_sdk.worker_messages import Setup

if TYPE_CHECKING:
    from edge_sdk.resident import Trainee

MAX_BACKOFF_S = 60.0
SLICE_S = 0.25  # a waiting agent hears a pause or the end of one this soon
FOLLOW_S = 10.0  # how often a device without data looks for a newer version
LINGER_S = 60.0  # a paused device keeps a base that was loaded to answer somebody this long after the answer


class Participation:
    """What one thread does for a device in its federation.

    Args:
        membership: who the device is.
        data: its own text; None to follow the versions without training.

    Attributes:
        stopping: set it to end the loop after the step in hand.
        activity: what a stop has to wait for at this moment.
    """

    def __init__(self, membership: Membership, data: Path | None) -> None:
        self._membership, self._data, self._options = membership, data, membership.options
        self._tell = membership.tell
        self.stopping = threading.Event()
        self.activity = ""
        self.watch = Watch(self._options.conditions)
        self.model = ResidentModel(self._load)
        # A device that trains and a program that only asks may share a state folder, but no downloads.
        journal = membership.journal
        published = PublishedAdapters(membership, journal.adapters if data else journal.folder / "served")
        self.serving = Serving(membership, published, self.model)
        self._fitting: Fitting | None = None
        self._work = AssignmentRun(membership, published, self._interrupted)
        self._backoff_s = 0.0
        self._enrolled = False

    # --- getting ready ---

    def prepare(self) -> RankChoice:
        """Everything before the first assignment."""
        self._enrol()
        self._ready()
        return self.fitting.choice

    @property
    def fitting(self) -> Fitting:
        """How this device trains now."""
        if self._fitting is None:
            raise InputError("the rank is chosen when the agent has prepared; call prepare() first")
        return self._fitting

    def _enrol(self) -> None:
        """All that needs no weights: read the data, join, see whether the memory is enough."""
        from edge_sdk import dataset

        if self._data and not self._enrolled:
            dataset.load_examples(self._data)  # a mistake in it is told before anything else is done
        with self._doing("an answer of the coordinator, or the check of the base model"):
            self._membership.connect()
        if self._enrolled:
            return
        if self._data:
            federation = self._membership.federation
            self._fitting = Fitting(federation, self._options, self._membership.journal)
            if self._fitting.decision.notice:
                self._tell("unquantised", self._fitting.decision.notice)
            self._tell("rank", self._fitting.choice.reason)
        for what in manners.unmeasured(self._options.conditions, self.watch.look()):
            self._tell("notice", f"this machine does not tell {what}; that condition holds nothing back")
        self._enrolled = True

    def _ready(self) -> Trainee:
        """The base in memory."""
        with self._doing("the base model to load"):
            return self.model.worker()

    def _load(self) -> Trainee:
        """A worker with the base loaded."""
        federation, options = self._membership.federation, self._options
        setup = Setup(
            model=enrolment.model_of(federation, options),
            modules=federation.base.modules,
            scaling=federation.scaling,
            upload_dtype=federation.upload_dtype,
            data=str(self._data) if self._data else None,
            device=options.device,
            quantise=self._fitting.decision.quantise if self._fitting else options.quantise,
            bitsandbytes=self._fitting.decision.bitsandbytes if self._fitting else True,
            threads=options.threads,
            niceness=options.nice,
            progress=options.progress if options.progress is not None else sys.stderr.isatty(),
            alone=options.isolate,
        )
        return _in_a_process(setup) if options.isolate else _in_this_process(setup)

    # --- the loop ---

    def run(self, updates: int | None) -> int:
        """Take part until `stopping`, or until that many updates are delivered; returns how many were."""
        self._enrol_patiently()
        done = 0
        while not self.stopping.is_set() and (updates is None or done < updates):
            if (reason := self.watch.reason()) is not None:
                self._pause(reason)
                continue
            try:
                done += self._step()
                self._backoff_s = 0.0
            except (Unreachable, OurFault) as error:
                self._back_off(error)
        return done

    def _enrol_patiently(self) -> None:
        """A device that has joined before waits for a coordinator that does not answer; a new one fails."""
        while not self.stopping.is_set():
            try:
                self._enrol()
                return
            except (Unreachable, OurFault) as error:
                if self._membership.journal.load() is None:
                    raise
                self._back_off(error)

    def _step(self) -> int:
        """Do what the session's phase asks for; 1 if an update was delivered by it."""
        from edge_sdk.training import Interrupted

        try:
            if self._data is None:
                self._follow()
            elif self._membership.session.phase == "idle":
                self._ask()
            elif self._membership.session.phase == "training":
                self._train()
            else:
                with self._doing("an upload, or its acknowledgement"):
                    return self._work.deliver()
        except (Interrupted, TransferStopped):
            return 0
        except StaleUpdate as error:
            self._membership.drop(f"came too late: {error}")
        except NotFound as error:
            if self._data is None:
                raise
            self._membership.drop(f"the coordinator does not know this work any more: {error}")
        return 0

    def _ask(self) -> None:
        """Get an assignment, or wait as long as the coordinator says."""
        self._ready()
        if self._interrupted():
            return
        chosen = self.fitting.again()
        with self._doing("an answer of the coordinator"):
            answer = self._membership.transport.ask(Ask(chosen.rank, chosen.setting.carry_rank))
        if isinstance(answer, NotNow):
            self._tell("waiting", answer.reason)
            # Up to a quarter more, so that devices told the same do not come back together.
            self._rest(answer.retry_after_s * (1 + random.random() / 4))
            return
        self._membership.journal.clear_work()
        setting = self.fitting.setting_for(answer)
        self._membership.save(sessions.assigned(self._membership.session, answer, setting))

    def _train(self) -> None:
        """Train the work in hand; where memory runs out, go on in a smaller way the next time round."""
        with self._doing("a download"):
            files = self._work.fetch()
        worker, session = self._ready(), self._membership.session
        if self._interrupted():
            return
        try:
            with self._doing("the training step in hand"):
                done = self._work.train(files, worker)
        except OutOfMemory as error:
            self._step_down(error)
        except WorkerDied:
            self.model.let_go()
            raise
        else:
            if done is not None and self._options.isolate:
                self.fitting.learn(session.way(), done.memory)

    def _step_down(self, error: OutOfMemory) -> None:
        """Choose a smaller way for the work in hand, with a fresh worker: what ran full stays ragged."""
        self.model.let_go()
        try:
            smaller = self.fitting.smaller(self._membership.session.way())
        except InputError:
            self._membership.drop(str(error))
            raise
        self._membership.save(sessions.refitted(self._membership.session, smaller))
        self._tell("memory", f"{error}; it goes on with {smaller}")

    def _follow(self) -> None:
        """A device without data: have the newest version here, and look again later."""
        with self._doing("a download"):
            version = self.serving.refresh(self._interrupted)
        self._membership.heard_of(version)
        self._rest(FOLLOW_S)

    def _interrupted(self) -> bool:
        """Whether to leave off now: to stop, or to pause."""
        return self.stopping.is_set() or self.watch.reason() is not None

    def _pause(self, reason: str) -> None:
        """Let go of the model and wait until training may go on, or is told to stop."""
        with self._doing("an answer of the model"):
            self.model.let_go()
        self._tell("paused", PAUSED + reason)
        while not self.stopping.wait(SLICE_S) and self.watch.reason() is not None:
            with self._doing("an answer of the coordinator"):
                self._work.beat_while_paused()
            self.model.let_go(unless_asked_s=LINGER_S)
        if not self.stopping.is_set():
            self._tell("resumed", "resumed")

    def _back_off(self, error: EdgeError) -> None:
        """Wait twice as long as the last time, with jitter, up to a minute."""
        self._backoff_s = min(MAX_BACKOFF_S, max(1.0, 2 * self._backoff_s))
        wait_s = self._backoff_s * (0.5 + random.random() / 2)
        self._tell("offline", f"{error}; trying again in {wait_s:.0f} s")
        self._rest(wait_s)

    def _rest(self, seconds: float) -> None:
        """Do nothing for a while, or until told to stop or to pause."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._interrupted():
            self.stopping.wait(min(left, SLICE_S))

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """While inside, a `stop` that has to wait says that it waits for `what`."""
        self.activity = what
        try:
            yield
        finally:
            self.activity = ""


def _in_a_process(setup: Setup) -> Trainee:
    """A worker in a process of its own; if it cannot be made, none is left behind."""
    from edge_sdk.worker_process import WorkerProcess

    worker = WorkerProcess(setup)
    try:
        worker.prepare()
    except BaseException:
        worker.close()
        raise
    return worker


def _in_this_process(setup: Setup) -> Trainee:
    """A worker that shares the application's process, its libraries and its fate."""
    from edge_sdk.worker import Worker

    return Worker(setup)
