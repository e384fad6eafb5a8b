"""One assignment on the device: fetch what to train from, train, put the result in the outbox, deliver it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk.core.adapter_file.codec import sha256_file
from edge_sdk.core.errors import (
    NotFound,
    OurFault,
    StaleUpdate,
    TheirFault,
    Unauthorised,
    Unreachable,
    UploadLost,
)
from edge_sdk.core.messages import Directive, Heartbeat, Update
from edge_sdk.membership.adapter_cache import AdapterCache, AdapterKey
from edge_sdk.membership.limits import least_steps
from edge_sdk.membership.membership import Membership
from edge_sdk.membership.session import delivered, spoilt, trained
from edge_sdk.system.backoff import Backoff, asked_by
from edge_sdk.training.plan import Plan
from edge_sdk.worker.messages import Finished, Job

if TYPE_CHECKING:
    from edge_sdk.participation.resident_model import Trainee
    from edge_sdk.training.plan import StepAnswer, StepReport


class AssignmentRun:
    """Carries the assignment of the session through its phases, as often interrupted as need be.

    Args:
        membership: the session with the assignment, and the connection.
        adapters: what there is to start from.
        interrupted: whether to leave off and go on later; asked after every step and within transfers.
        clock: tells seconds; heartbeats are due by it.
    """

    def __init__(
        self,
        membership: Membership,
        adapters: AdapterCache,
        interrupted: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._membership, self._adapters, self._interrupted = membership, adapters, interrupted
        self._clock = clock
        self._tell = membership.tell
        self._steps_done = 0
        self._beat_due = 0.0
        self._beats = Backoff()
        self._offline = False
        self._full = False
        self._finished: tuple[str, Finished] | None = None  # of which assignment, until the session says so

    # --- training ---

    def fetch(self) -> tuple[Path | None, Path | None]:
        """The files that the rule trains from, downloaded: what is trained itself, what is carried.

        Raises:
            TransferStopped: left off in the middle; the next attempt goes on from there.
        """
        work = self._membership.session.current()
        if self._membership.federation.carries:
            return None, self._start(work.carry_rank) if work.carry_rank else None
        return self._start(work.rank), None

    def _start(self, rank: int) -> Path:
        """The assignment's version at a rank."""
        work = self._membership.session.current()
        return self._adapters.have(AdapterKey(work.version, rank, work.start), "work", self._interrupted)

    def train(self, files: tuple[Path | None, Path | None], worker: Trainee) -> Finished | None:
        """Train the assignment in hand, from its checkpoint if there is one, into the outbox.

        None if the coordinator no longer needs it.

        Raises:
            Interrupted: left off with a checkpoint.
            OutOfMemory, WorkerDied: as `WorkerProcess.train`.
            Unwritable: it is trained, but the session cannot be saved; the next call does only that.
        """
        from edge_sdk.training.plan import Abandoned

        work = self._membership.session.current()
        if self._finished and self._finished[0] == work.id:
            return self._hand_in(self._finished[1])
        job = self._job(files)
        text = f"training version {work.version} at rank {job.ranks}, {work.steps} steps"
        self._tell("training", text, steps=work.steps, version=work.version)
        try:
            done = worker.train(job, self._on_step)
        except Abandoned:
            self._membership.drop("the coordinator no longer needs it")
            return None
        self._finished = work.id, done
        return self._hand_in(done)

    def _job(self, files: tuple[Path | None, Path | None]) -> Job:
        session, journal = self._membership.session, self._membership.journal
        work, training, setting = session.current(), session.federation.training, session.way()
        plan = Plan(
            steps=work.steps,
            batch=training.batch,
            micro_batch=setting.micro_batch,
            sequence_len=setting.sequence_len,
            learning_rate=training.learning_rate_at(work.version),
            duty=self._membership.options.duty,
            checkpoint_s=training.checkpoint_s,
            checkpointing=setting.checkpointing,
            optimizer=setting.optimizer,
            only_b=work.version < training.sparse_versions,
        )
        adapter, carried = files
        return Job(
            ranks=setting.ranks,
            seed=work.seed,
            plan=plan,
            checkpoint=str(journal.checkpoint),
            outbox=str(journal.outbox),
            adapter=str(adapter) if adapter else None,
            carried=str(carried) if carried else None,
            carry_rank=work.carry_rank,
            carried_dtype=setting.carried_dtype,
        )

    def _hand_in(self, done: Finished) -> Finished:
        """What lies in the outbox is the outcome from now on."""
        update = Update(
            digest=done.digest,
            size_bytes=done.size_bytes,
            rank=done.rank,
            examples=done.examples,
            steps=done.steps,
            loss_before=done.loss_before,
            loss_after=done.loss_after,
            train_s=done.seconds,
        )
        self._membership.save(trained(self._membership.session, update))
        self._finished = None
        return done

    # --- heartbeats ---

    def _on_step(self, report: StepReport) -> StepAnswer:
        """Report progress now and then; answer with the coordinator's word, or the device's own."""
        work, self._steps_done = self._membership.session.current(), report.step
        self._tell("step", "", report.step, work.steps, report.loss, work.version)
        if report.trouble and not self._full:
            self._tell("disk", f"{report.trouble}; training goes on, and it is tried again")
        elif self._full and not report.trouble:
            self._tell("disk", "the state folder can be written again")
        self._full = bool(report.trouble)
        return "interrupt" if self._interrupted() else self._beat()

    def _beat(self) -> Directive:
        """Send a heartbeat if one is due. A coordinator that cannot be reached stops no training."""
        now = self._clock()
        if now < self._beat_due:
            return "continue"
        work, every_s = self._membership.session.current(), self._membership.federation.heartbeat_s
        try:
            reply = self._membership.transport.heartbeat(work.id, Heartbeat(self._steps_done))
        except (Unreachable, OurFault) as error:
            if not self._offline:  # once, however long it lasts
                self._tell("offline", f"training goes on without the coordinator: {error}")
            self._offline = True
            self._beat_due = self._clock() + max(every_s, self._beats.next_s(asked_by(error)))
            return "continue"
        self._offline, self._beat_due = False, now + every_s
        self._beats.reset()
        if reply.directive == "finish" and self._steps_done < self._least_steps():
            return "continue"  # what so few examples have changed says too much of each
        return reply.directive

    def _least_steps(self) -> int:
        return least_steps(self._membership.federation, self._membership.options.limits)

    def beat_while_paused(self) -> None:
        """Keep in touch about work that rests in its checkpoint; drop it when it can count no more.

        Raises:
            Unwritable: it cannot be dropped now; the next beat tries again.
            Unauthorised: this device is not known any more.
        """
        if self._membership.session.phase != "training":
            return
        self._offline = True  # a paused device has nothing to say about that
        try:
            if self._beat() == "abandon":
                self._membership.drop("the coordinator no longer needs it")
        except NotFound as error:
            self._membership.drop(f"the coordinator does not know this work any more: {error}")

    # --- delivering ---

    def deliver(self) -> int:
        """Upload what lies in the outbox and have it acknowledged: 1. If it is refused for good: 0.

        Raises:
            TransferStopped: left off in the middle; the next attempt goes on from there.
            Unreachable, OurFault: the next attempt goes on from where the coordinator's bytes end.
        """
        membership, journal = self._membership, self._membership.journal
        session, transport = membership.session, membership.transport
        work, update = session.current(), session.update
        assert update is not None
        if not _holds(journal.outbox, update):
            membership.save(spoilt(session))
            self._tell("notice", f"{journal.outbox} is damaged; it is trained again from its checkpoint")
            return 0
        try:
            transport.upload(work.id, journal.outbox, self._interrupted)
            reply = transport.deliver(work.id, update)
        except UploadLost as error:
            raise Unreachable(
                f"the upload did not arrive as it was sent ({error}); it is sent again"
            ) from error
        except (StaleUpdate, NotFound, Unauthorised):
            raise
        except TheirFault as error:
            membership.drop(f"the update was refused: {error}")
            return 0
        membership.save(delivered(session, reply.current_version))
        journal.clear_work()
        text = f"delivered rank {update.rank} from version {work.version}, loss {update.loss_after:.3f}"
        self._tell("delivered", text, loss=update.loss_after, version=work.version)
        return 1


def _holds(path: Path, update: Update) -> bool:
    """Whether a file is what the update announces."""
    try:
        return path.stat().st_size == update.size_bytes and sha256_file(path) == update.digest
    except FileNotFoundError:
        return False
