"""What the journal promises, against a naive model: whatever is cut off, lost, repeated or damaged, and
wherever the device dies, finished work is delivered, and none of it twice.

The loop of the device and its files are the real ones. The coordinator is a dictionary, and training writes a
file of its own each time, as an accelerator that rounds differently each time would.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge_sdk.callbacks import Callbacks, Teller
from edge_sdk.connection.transport import TransferStopped
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.errors import NotFound, ProtocolError, StaleUpdate, Unreachable, UploadLost
from edge_sdk.core.messages import Assignment, HeartbeatReply, JoinReply, NotNow, UpdateReply
from edge_sdk.membership import journal
from edge_sdk.membership.journal import Journal
from edge_sdk.membership.membership import Membership
from edge_sdk.membership.session import Session, joined
from edge_sdk.options import Options
from edge_sdk.participation import loop
from edge_sdk.participation.collaborators import Collaborators
from edge_sdk.system import durable
from edge_sdk.training.plan import Abandoned, StepReport
from edge_sdk.worker.messages import Finished, Memory
from tests.edge_sdk.core.wire_samples import FEDERATION

SETTING = Setting(Ranks.uniform(4), carry_rank=0, sequence_len=32, micro_batch=2)
STEPS = 5
LOST = ["none", "before", "after", "twice"]  # of one call: nothing; the request; the answer; it came twice


class Crash(BaseException):
    """The device loses power."""


class Coordinator:
    """What the other side should do, as simply as can be. It forgets nothing."""

    def __init__(self) -> None:
        self.granted = 0
        self.open: str | None = None
        self.stale: set[str] = set()
        self.unknown: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.accepted: list[tuple[str, str]] = []
        self.refused: dict[str, str] = {}

    def ask(self) -> Assignment:
        if self.open is None:
            self.granted += 1
            self.open = f"work-{self.granted}"
        return Assignment(self.open, self.granted, 4, 0, STEPS, self.granted, 600.0)

    def require(self, id: str) -> None:
        if id in self.unknown:
            self.refused[id] = "unknown"
            raise NotFound(id)

    def deliver(self, id: str, digest: str) -> UpdateReply:
        self.require(id)
        known = dict(self.accepted).get(id)
        if known is None:
            self._accept(id, digest)
        elif known != digest:
            self.refused[id] = "delivered before"
            raise ProtocolError("delivered before")
        return UpdateReply(id, self.granted)

    def _accept(self, id: str, digest: str) -> None:
        if id in self.stale:
            self.refused[id] = "stale"
            raise StaleUpdate("too old")
        content = self.uploads.pop(id, None)
        if content is None or hashlib.sha256(content).hexdigest() != digest:
            raise UploadLost("upload again")
        self.accepted.append((id, digest))
        self.open = None if self.open == id else self.open


class Wire:
    """The transport of the device, with the faults of one step."""

    def __init__(self, coordinator: Coordinator, faults: list[str]) -> None:
        self._coordinator, self._faults = coordinator, faults
        self.directive: Any = "continue"

    def _through(self, call: Callable[[], Any]) -> Any:
        fault = self._faults.pop(0) if self._faults else "none"
        if fault == "before":
            raise Unreachable("nobody heard it")
        answer = call()
        if fault == "twice":
            answer = call()
        if fault == "after":
            raise Unreachable("nobody heard the answer")
        return answer

    def ask(self, ask: object) -> Assignment | NotNow:
        answer: Assignment = self._through(self._coordinator.ask)
        return answer

    def heartbeat(self, id: str, beat: object) -> HeartbeatReply:
        def call() -> HeartbeatReply:
            self._coordinator.require(id)
            if self.directive == "abandon":
                self._coordinator.refused[id] = "abandoned"
                self._coordinator.open = None
            return HeartbeatReply(self.directive)

        answer: HeartbeatReply = self._through(call)
        return answer

    def upload(self, id: str, path: Path, stopping: object) -> None:
        if self._faults[:1] == ["twice"]:
            raise TransferStopped
        self._coordinator.require(id)
        known = dict(self._coordinator.accepted)
        if id not in known:
            self._through(lambda: self._coordinator.uploads.update({id: path.read_bytes()}))

    def deliver(self, id: str, update: Any) -> UpdateReply:
        answer: UpdateReply = self._through(lambda: self._coordinator.deliver(id, update.digest))
        return answer


class DeviceOverTime(RuleBasedStateMachine):
    """A device that is cut off and killed, and what must be true of it at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.coordinator = Coordinator()
        self.on_disk: Session | None = None
        self.finished: dict[str, str] = {}  # assignment -> digest, once the session on disk says so
        self.trainings = 0
        self.dies_at: int | None = None
        self.dies_after_writing = False
        self._write, self._fsync = durable.write_durably, os.fsync
        journal.write_durably = self._writing  # type: ignore[attr-defined]
        os.fsync = lambda descriptor: None  # type: ignore[assignment]  # power fails in name only

    def teardown(self) -> None:
        try:
            self.everything_arrives()
        finally:
            journal.write_durably = self._write  # type: ignore[attr-defined]
            os.fsync = self._fsync
            shutil.rmtree(self.folder)

    # --- dying ---

    def _may_die(self) -> bool:
        """Whether power fails at this persistence point."""
        if self.dies_at is None:
            return False
        self.dies_at -= 1
        return self.dies_at < 0

    def _writing(self, path: Path, data: bytes) -> None:
        dies = self._may_die()
        if dies and not self.dies_after_writing:
            path.with_name(f".{path.name}.tmp").write_bytes(data[: len(data) // 2])
            raise Crash
        self._write(path, data)
        if path.name == journal.SESSION:
            self._note()
        if dies:
            raise Crash

    def _clearing(self) -> None:
        journal = self.membership.journal
        if self._may_die():
            (journal.outbox if self.dies_after_writing else journal.checkpoint).unlink(missing_ok=True)
            raise Crash
        journal.checkpoint.unlink(missing_ok=True)
        journal.outbox.unlink(missing_ok=True)

    def _note(self) -> None:
        """What the session on the disk says is finished must arrive."""
        self.on_disk = Journal(self.folder).load()
        if self.on_disk and self.on_disk.phase == "outbox" and self.on_disk.update:
            self.finished[self.on_disk.current().id] = self.on_disk.update.digest

    # --- the device ---

    @initialize()
    def boots(self) -> None:
        self.dies_at = None
        teller = Teller(lambda event: None, Callbacks())
        membership = Membership("http://host", Options(state_dir=self.folder, isolate=False), "token", teller)
        if membership.journal.load() is None:
            membership.save(joined("http://host", JoinReply("d", "secret", FEDERATION)))
        membership._session = membership.journal.load()
        membership.journal.clear_work = self._clearing  # type: ignore[method-assign]
        self.membership = membership
        hours = itertools.count(step=3600.0)  # every wait is over at once, and a heartbeat due at every step
        collaborators = Collaborators(clock=lambda: next(hours), make_worker=lambda *_: self)
        self.part = loop.Participation(membership, self.folder / "data", collaborators)
        self.part._setting = SimpleNamespace(  # type: ignore[assignment]
            again=lambda: SimpleNamespace(rank=4, setting=SETTING),
            setting_for=lambda work: SETTING,
            decision=None,
        )
        self.part._work.fetch = lambda: (None, None)  # type: ignore[method-assign]

    def train(self, job: Any, on_step: Any) -> Finished:
        """The worker: from the checkpoint if there is one, to an adapter that is never twice the same."""
        checkpoint, outbox = Path(job.checkpoint), Path(job.outbox)
        mark = f"{job.seed}:"
        kept = checkpoint.read_text() if checkpoint.exists() else ""
        done = int(kept.removeprefix(mark)) if kept.startswith(mark) else 0
        for step in range(done + 1, STEPS + 1):
            self._writing(checkpoint, f"{mark}{step}".encode())
            answer = on_step(StepReport(step, STEPS, 1.0, 2 * step, 0.1))
            if answer == "abandon":
                raise Abandoned
            done = step
            if answer == "finish":
                break
        self.trainings += 1
        content = f"{job.seed} trained {done} steps, time {self.trainings}".encode()
        self._writing(outbox, content)
        digest = hashlib.sha256(content).hexdigest()
        return Finished(4, digest, len(content), 2 * done, done, 2.0, 1.0, 0.1, Memory(0, 0, 0))

    def generate(self, question: Any, on_text: Any = None) -> list[str]:
        raise AssertionError("nobody asks it")

    def close(self) -> None:
        """The worker needs no memory."""

    def works(self, wire: Wire) -> None:
        """One turn of the loop, as `Participation.run` makes it."""
        self.membership._transport = wire  # type: ignore[assignment]
        try:
            self.part.step()
        except (Unreachable, loop.OurFault):
            return
        except Crash:
            self.boots()

    # --- what happens ---

    @rule(
        faults=st.lists(st.sampled_from(LOST), max_size=6),
        dies_at=st.none() | st.integers(0, 8),
        after=st.booleans(),
        directive=st.sampled_from(["continue", "continue", "continue", "finish", "abandon"]),
    )
    def goes_on(self, faults: list[str], dies_at: int | None, after: bool, directive: str) -> None:
        wire = Wire(self.coordinator, list(faults))
        wire.directive = directive
        self.dies_at, self.dies_after_writing = dies_at, after
        self.works(wire)
        self.dies_at = None

    @rule()
    def works_undisturbed(self) -> None:
        self.works(Wire(self.coordinator, []))

    @rule()
    def is_killed(self) -> None:
        self.boots()

    @rule(what=st.sampled_from(["outbox", "checkpoint"]), gone=st.booleans())
    def a_file_is_damaged(self, what: str, gone: bool) -> None:
        path: Path = getattr(self.membership.journal, what)
        if path.exists():
            path.unlink() if gone else path.write_bytes(b"damaged")

    @rule()
    def an_upload_is_lost(self) -> None:
        self.coordinator.uploads.clear()

    @rule()
    def the_work_grows_stale(self) -> None:
        if self.coordinator.open:
            self.coordinator.stale.add(self.coordinator.open)
            self.coordinator.open = None

    @rule()
    def the_work_is_forgotten(self) -> None:
        if self.coordinator.open:
            self.coordinator.unknown.add(self.coordinator.open)
            self.coordinator.open = None

    # --- what must be true ---

    @invariant()
    def nothing_counts_twice(self) -> None:
        ids = [id for id, _ in self.coordinator.accepted]
        assert len(ids) == len(set(ids))

    @invariant()
    def nothing_finished_is_lost(self) -> None:
        assert self.on_disk is not None
        held = self.on_disk.assignment.id if self.on_disk.assignment else None
        arrived = dict(self.coordinator.accepted)
        for id in self.finished:
            assert id in arrived or id in self.coordinator.refused or id == held, id

    @invariant()
    def what_is_told_as_delivered_was(self) -> None:
        assert self.membership.session.delivered <= len(self.coordinator.accepted)

    def everything_arrives(self) -> None:
        """With a calm link and no more crashes the device comes to rest with nothing in hand."""
        self.boots()
        before = len(self.coordinator.accepted)
        for _ in range(8):
            self.works(Wire(self.coordinator, []))
        assert len(self.coordinator.accepted) > before
        self.nothing_counts_twice()
        self.nothing_finished_is_lost()


DeviceOverTime.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestDeviceOverTime = DeviceOverTime.TestCase
