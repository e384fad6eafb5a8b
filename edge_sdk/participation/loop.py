"""The device's loop: enrol, ask, download, train, upload, deliver, ask …, with pauses where they are due."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk import conditions
from edge_sdk.callbacks import PAUSED
from edge_sdk.connection.transport import TransferStopped
from edge_sdk.core.choice.rank import RankChoice
from edge_sdk.core.errors import (
    Busy,
    InputError,
    NotFound,
    OurFault,
    OutOfMemory,
    StaleUpdate,
    Unauthorised,
    Unreachable,
    Unwritable,
    WorkerDied,
)
from edge_sdk.core.messages import Ask, NotNow
from edge_sdk.machine.surroundings import Watch
from edge_sdk.membership import limits
from edge_sdk.membership.adapter_cache import AdapterCache
from edge_sdk.membership.membership import Membership
from edge_sdk.membership.session import assigned, refitted
from edge_sdk.participation.assignment import AssignmentRun
from edge_sdk.participation.assistant import Assistant
from edge_sdk.participation.collaborators import Collaborators
from edge_sdk.participation.current_setting import CurrentSetting
from edge_sdk.participation.resident_model import ResidentModel
from edge_sdk.participation.setbacks import Setbacks

if TYPE_CHECKING:
    from edge_sdk.participation.resident_model import Trainee

SLICE_S = 0.25  # a waiting agent hears a pause or the end of one this soon
FOLLOW_S = 10.0  # how often a device without data looks for a newer version
LINGER_S = 60.0  # a paused device keeps a base that was loaded to answer somebody this long after the answer


class Participation:
    """What one thread does for a device in its federation.

    Args:
        membership: who the device is.
        data: its own text; None to follow the versions without training.
        collaborators: the clock, the worker and the measurements that it works with.

    Attributes:
        stopping: set it to end the loop after the step in hand.
        activity: what a stop has to wait for at this moment.
    """

    def __init__(self, membership: Membership, data: Path | None, collaborators: Collaborators) -> None:
        self._membership, self._data, self._options = membership, data, membership.options
        self._tell = membership.tell
        self.stopping = threading.Event()
        self.activity = ""
        self._clock, self._make_worker = collaborators.clock, collaborators.make_worker
        self.watch = Watch(self._options.conditions, collaborators.measure, self._clock)
        self.model = ResidentModel(self._load, self._clock)
        # A device that trains and a program that only asks may share a state folder, but no downloads.
        journal = membership.journal
        adapters = AdapterCache(membership, journal.adapters if data else journal.folder / "served")
        self.assistant = Assistant(membership, adapters, self.model, self._clock)
        self._setting: CurrentSetting | None = None
        self._work = AssignmentRun(membership, adapters, self._interrupted, self._clock)
        self._setbacks = Setbacks(membership.tell)
        self._enrolled = False

    # --- getting ready ---

    def prepare(self) -> RankChoice:
        """Everything before the first assignment."""
        with self._alone():
            self._enrol()
            self._ready()
        return self.setting.choice

    @property
    def setting(self) -> CurrentSetting:
        """How this device trains now."""
        if self._setting is None:
            raise InputError("the rank is chosen when the agent has prepared; call prepare() first")
        return self._setting

    def _enrol(self) -> None:
        """All that needs no weights: read the data, join, see whether the memory is enough."""
        from edge_sdk.text import rows

        if self._data and not self._enrolled:
            rows.load_examples(self._data)  # a mistake in it is told before anything else is done
        with self._doing("an answer of the coordinator, or the check of the base model"):
            self._membership.connect()
        if self._enrolled:
            return
        if self._data:
            federation = self._membership.federation
            self._setting = CurrentSetting(federation, self._options, self._membership.journal)
            if self._setting.decision.notice:
                self._tell("unquantised", self._setting.decision.notice)
            self._tell("rank", self._setting.choice.reason)
        for what in conditions.unmeasured(self._options.conditions, self.watch.look()):
            self._tell("notice", f"this machine does not tell {what}; that condition holds nothing back")
        self._enrolled = True

    def _ready(self) -> Trainee:
        """The base in memory."""
        with self._doing("the base model to load"):
            return self.model.worker()

    def _load(self) -> Trainee:
        decision = self._setting.decision if self._setting else None
        return self._make_worker(self._membership.federation, self._options, self._data, decision)

    # --- the loop ---

    def run(self, updates: int | None) -> int:
        """Take part until `stopping`, or until that many updates are delivered; returns how many were."""
        with self._alone():
            self._enrol_patiently()
            done = 0
            while not self.stopping.is_set() and (updates is None or done < updates):
                if (reason := self.watch.reason()) is not None:
                    self._pause(reason)
                    continue
                try:
                    done += self.step()
                except (Unreachable, OurFault) as error:
                    self._rest(self._setbacks.failed_s(error))
            return done

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only one who trains with the state folder; a device that only asks need not be."""
        if self._data is None:
            yield
            return
        with self._membership.journal.held():
            self._membership.take_over()
            yield

    def _enrol_patiently(self) -> None:
        """A device that has joined before waits for a coordinator that does not answer; a new one fails.

        Unless it was told when to come back: many may join at a time.
        """
        while not self.stopping.is_set():
            try:
                self._enrol()
                return
            except (Unreachable, OurFault) as error:
                if self._membership.journal.load() is None and not isinstance(error, Busy):
                    raise
                self._rest(self._setbacks.failed_s(error))

    def step(self) -> int:
        """Do what the session asks for next: get work, train it or hand it in; 1 if it was delivered."""
        from edge_sdk.training.plan import Interrupted

        try:
            return self._follow() if self._data is None else self._do()
        except (Interrupted, TransferStopped):
            return 0
        except StaleUpdate as error:
            self._drop(f"came too late: {error}")
        except NotFound as error:
            if self._membership.session.phase == "idle":
                raise
            self._drop(f"the coordinator does not know this work any more: {error}")
        except Unauthorised:
            if not self._membership.rejoin():
                raise
            self._rest(self._setbacks.refused_s())
        return 0

    def _do(self) -> int:
        """What the session's phase asks for; 1 if an update was delivered by it."""
        phase = self._membership.session.phase
        if phase == "outbox":
            return self._deliver()
        if phase == "idle":
            self._ask()
        else:
            self._train()
        return 0

    def _drop(self, reason: str) -> None:
        """Give up the work in hand, and rest a little."""
        self._membership.drop(reason)
        self._rest(self._setbacks.refused_s())

    def _deliver(self) -> int:
        with self._doing("an upload, or its acknowledgement"):
            delivered = self._work.deliver()
        if delivered:
            self._setbacks.over()
        elif self._membership.session.phase == "idle":  # it was refused
            self._rest(self._setbacks.refused_s())
        return delivered

    def _ask(self) -> None:
        """Get an assignment, or wait as long as the coordinator says."""
        self._ready()
        if self._interrupted():
            return
        chosen = self.setting.again()
        with self._doing("an answer of the coordinator"):
            run = self._membership.session.run
            answer = self._membership.transport.ask(Ask(chosen.rank, chosen.setting.carry_rank, run))
        if answer.elsewhere:
            self._membership.asked_elsewhere()
        if isinstance(answer, NotNow):
            self._setbacks.over()
            self._tell("waiting", answer.reason)
            self._rest(self._setbacks.asked_s(answer.retry_after_s))
            if answer.renew:
                self._membership.renew()
            return
        limits.require_assignment(answer, self._membership.federation, self._options.limits)
        self._membership.journal.clear_work()
        setting = self.setting.setting_for(answer)
        self._membership.save(assigned(self._membership.session, answer, setting))
        if answer.renew:
            self._membership.renew()

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
            self._setbacks.over()
            if done is not None and self._options.isolate:
                self.setting.learn(session.way(), done.memory)

    def _step_down(self, error: OutOfMemory) -> None:
        """Choose a smaller way for the work in hand, with a fresh worker.

        After running out of memory a heap stays fragmented.
        """
        self.model.let_go()
        try:
            smaller = self.setting.smaller(self._membership.session.way())
        except InputError:
            self._membership.drop(str(error))
            raise
        self._membership.save(refitted(self._membership.session, smaller))
        self._tell("memory", f"{error}; it goes on with {smaller}")

    def _follow(self) -> int:
        """A device without data: have the newest version here, and look again later."""
        try:
            with self._doing("a download"):
                version = self.assistant.refresh(self._interrupted)
        except NotFound as error:
            raise Unreachable(f"what was published a moment ago is gone: {error}") from error
        self._membership.heard_of(version)
        self._setbacks.over()
        self._rest(FOLLOW_S)
        return 0

    def _interrupted(self) -> bool:
        """Whether to leave off now: to stop, or to pause."""
        return self.stopping.is_set() or self.watch.reason() is not None

    def _pause(self, reason: str) -> None:
        """Let go of the model and wait until training may go on, or is told to stop."""
        with self._doing("an answer of the model"):
            self.model.let_go()
        self._tell("paused", PAUSED + reason)
        while not self.stopping.wait(SLICE_S) and self.watch.reason() is not None:
            with self._doing("an answer of the coordinator"), contextlib.suppress(Unauthorised, Unwritable):
                self._work.beat_while_paused()  # training meets the same error when it goes on
            self.model.let_go(unless_asked_s=LINGER_S)
        if not self.stopping.is_set():
            self._tell("resumed", "resumed")

    def _rest(self, seconds: float) -> None:
        """Do nothing for a while, or until told to stop or to pause."""
        until = self._clock() + seconds
        while (left := until - self._clock()) > 0 and not self._interrupted():
            self.stopping.wait(min(left, SLICE_S))

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """While inside, a `stop` that has to wait says that it waits for `what`."""
        self.activity = what
        try:
            yield
        finally:
            self.activity = ""
