"""The device's loop, and what an application embeds.

    from edge_sdk import Agent

    agent = Agent("http://localhost:8765", data="notes.jsonl", join_token="…")
    agent.start()      # trains in a thread of its own until agent.stop()

probe → join → ask → download → train → upload → deliver → ask …, with everything that must survive a crash in
a journal. The text stays here: only LoRA factors, example counts and losses leave the device.
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk import enrolment
from edge_sdk import session as sessions
from edge_sdk.core import codec, memory
from edge_sdk.core.errors import (
    EdgeError,
    InputError,
    NotFound,
    OurFault,
    StaleUpdate,
    TheirFault,
    Unauthorised,
    Unreachable,
)
from edge_sdk.core.lora import Adapter
from edge_sdk.core.messages import (
    Ask,
    Directive,
    Federation,
    Heartbeat,
    NotNow,
    Update,
)
from edge_sdk.journal import Journal
from edge_sdk.options import Event, Kind, Options, default_state_dir
from edge_sdk.session import Session
from edge_sdk.transport import Transport

if TYPE_CHECKING:
    from edge_sdk.dataset import Tokenised
    from edge_sdk.trainer import StepReport, Trainer

log = logging.getLogger("edge_sdk")

MAX_BACKOFF_S = 60.0


class Agent:
    """One device in one federation.

    Args:
        url: the coordinator's address.
        data: JSONL file with this device's own text; None only to fetch adapters.
        join_token: the federation's; needed until this device has joined once.
        options: see Options.
        on_event: called with each Event, in the agent's thread.
    """

    def __init__(
        self,
        url: str,
        *,
        data: Path | str | None = None,
        join_token: str | None = None,
        options: Options | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.options = options or Options()
        self.journal = Journal(self.options.state_dir or default_state_dir(self.url, self.options.name))
        self._data = Path(data) if data is not None else None
        self._join_token = join_token
        self._on_event = on_event or (lambda event: log.info("%s", event.text))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: EdgeError | None = None
        self._backoff_s = 0.0
        self._session: Session | None = None
        self._trainer: Trainer | None = None
        self._examples: list[Tokenised] = []
        self._choice: memory.RankChoice | None = None
        self._transport: Transport | None = None

    # --- life ---

    def start(self) -> None:
        """Run in a thread of its own. A failure that ends it is logged, and `stop` raises it."""
        self._stop.clear()
        self._failure = None
        self._thread = threading.Thread(target=self._run_and_keep_failure, name="edge-sdk", daemon=True)
        self._thread.start()

    def _run_and_keep_failure(self) -> None:
        try:
            self.run()
        except EdgeError as error:
            self._failure = error
            log.error("%s", error)

    def request_stop(self) -> None:
        """Ask a run in any thread to end after the training step in hand. Returns at once; signal-safe."""
        self._stop.set()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the run after the training step in hand; its work goes on from a checkpoint next time.

        Raises:
            EdgeError: what ended the run by itself before.
        """
        self.request_stop()
        if self._thread:
            self._thread.join(timeout_s)
            if self._failure:
                raise self._failure

    def run(self, updates: int | None = None) -> int:
        """Take part until `stop()`, or until `updates` more updates are delivered; returns how many were.

        Raises:
            InputError: the data, the model or the memory are not enough; nothing was sent.
            Unreachable: the coordinator could not be reached on the very first call. Later it is waited for.
            TheirFault: this device was refused (wrong token, wrong base model).
        """
        self.prepare()
        done = 0
        while not self._stop.is_set() and (updates is None or done < updates):
            try:
                done += self._step()
                self._backoff_s = 0.0
            except (Unreachable, OurFault) as error:
                self._back_off(error)
        self._tell("stopped", f"stopped after {done} updates")
        return done

    def prepare(self) -> Trainer:
        """Everything before the first assignment: read the data, join, choose the rank, load the base."""
        if self._trainer is not None:
            return self._trainer
        try:
            return self._prepare()
        except EdgeError:
            self.close()
            raise

    def close(self) -> None:
        """Hang up. A later `run` or `prepare` of a new Agent goes on where this one was."""
        if self._transport is not None:
            self._transport.close()

    def _prepare(self) -> Trainer:
        from edge_sdk import base_model, dataset, trainer

        raw = dataset.load_examples(self._data) if self._data else []
        base_model.use_threads(self.options.threads)
        federation = self._membership().federation
        self._choice = enrolment.choose_rank(federation, self.options)
        self._tell("rank", self._choice.reason)
        model = enrolment.model_of(federation, self.options)
        base = base_model.load(model, device=self.options.device, quantise=self.options.quantise)
        length = federation.training.sequence_len
        self._examples = [dataset.tokenise(example, base.tokenizer, length) for example in raw]
        self._trainer = trainer.Trainer(
            base, federation.base.modules, federation.scaling, self.options.progress
        )
        return self._trainer

    # --- what this device is ---

    def _membership(self) -> Session:
        """The session of an earlier run, or a new one by joining. Checks the base model either way."""
        known = self.journal.load()
        token = known.credential if known else self._join_token
        if not token:
            raise InputError("this device has not joined yet; give it the federation's join token")
        self._transport = Transport(self.url, token)
        federation = self._transport.federation()
        fingerprint = enrolment.fingerprint(federation, self.options, self.journal.folder / "digests.json")
        federation.base.require(fingerprint)
        if known and known.federation == federation:
            self._session = known
            return known
        if known:
            raise InputError(
                f"{self.journal.folder} belongs to federation {known.federation.id}, but {self.url} serves "
                f"{federation.id}; use another state folder"
            )
        reply = self._transport.join(enrolment.request(fingerprint, self.options))
        self._transport.close()
        self._transport = Transport(self.url, reply.credential)
        self._save(sessions.joined(self.url, reply))
        self._tell("joined", f"joined federation {federation.id} as {self.options.name}")
        return self._require_session()

    @property
    def choice(self) -> memory.RankChoice:
        """The rank that was chosen, and why."""
        if self._choice is None:
            raise InputError("the rank is chosen when the agent has prepared; call prepare() first")
        return self._choice

    @property
    def federation(self) -> Federation:
        """What this device takes part in."""
        return self._require_session().federation

    @property
    def transport(self) -> Transport:
        """The connection, once prepared."""
        if self._transport is None:
            raise InputError("not connected yet; call prepare() first")
        return self._transport

    # --- the loop ---

    def _step(self) -> int:
        """Do what the session's phase asks for; 1 if an update was delivered by it."""
        session = self._require_session()
        try:
            if session.phase == "idle":
                self._ask()
            elif session.phase == "training":
                self._train()
            else:
                return self._deliver()
        except StaleUpdate as error:
            self._drop(f"came too late: {error}")
        except NotFound as error:
            self._drop(f"the coordinator does not know this work any more: {error}")
        return 0

    def _ask(self) -> None:
        if not self._examples:
            raise InputError("no training data was given; pass data=FILE")
        answer = self.transport.ask(Ask(self.choice.rank, self.choice.carry_rank))
        if isinstance(answer, NotNow):
            self._tell("waiting", answer.reason)
            # Up to a quarter more, so that devices told the same do not come back together.
            self._stop.wait(answer.retry_after_s * (1 + random.random() / 4))
            return
        self.journal.clear_work()
        self._save(sessions.assigned(self._require_session(), answer, self.choice.micro_batch))

    def _train(self) -> None:
        """Train the assignment in hand, from its checkpoint if there is one, into the outbox."""
        from edge_sdk import trainer

        session = self._require_session()
        work, training = session.current(), session.federation.training
        assert self._trainer is not None
        if session.federation.rule == "carry":
            carried = self.fetch(work.version, work.carry_rank) if work.carry_rank else None
            start = trainer.Start(adapter=None, carried=carried, rank=work.rank, seed=work.seed)
        else:
            served = self.fetch(work.version, work.rank)
            start = trainer.Start(adapter=served, carried=None, rank=work.rank, seed=work.seed)
        plan = trainer.Plan(
            steps=work.steps,
            batch=training.batch,
            micro_batch=session.micro_batch,
            sequence_len=training.sequence_len,
            learning_rate=training.learning_rate_at(work.version),
            duty=self.options.duty,
            checkpoint_s=training.checkpoint_s,
        )
        text = f"training version {work.version} at rank {work.rank}, {work.steps} steps"
        self._tell("training", text, steps=work.steps, version=work.version)
        try:
            done = self._trainer.train(
                start,
                self._examples,
                plan,
                on_step=self._heartbeats(session),
                checkpoint=self.journal.checkpoint,
            )
        except trainer.Abandoned:
            if not self._stop.is_set():
                self._drop("the coordinator no longer needs this work")
            return
        adapter = codec.encode(done.adapter, session.federation.scaling)
        self.journal.put_outbox(adapter)
        update = Update(
            digest=hashlib.sha256(adapter).hexdigest(),
            size_bytes=len(adapter),
            rank=work.rank,
            examples=done.examples,
            steps=done.steps,
            loss_before=done.loss_before,
            loss_after=done.loss_after,
            train_s=done.seconds,
        )
        self._save(sessions.trained(session, update))

    def _heartbeats(self, session: Session) -> Callable[[StepReport], Directive]:
        """A step callback that reports progress now and then, and passes on what the coordinator answers.

        A coordinator that cannot be reached stops no training.
        """
        work = session.current()
        last = 0.0

        def on_step(report: StepReport) -> Directive:
            nonlocal last
            self._tell("step", "", report.step, work.steps, report.loss, work.version)
            if self._stop.is_set():
                return "abandon"
            if time.monotonic() - last < session.federation.heartbeat_s:
                return "continue"
            last = time.monotonic()
            try:
                return self.transport.heartbeat(work.id, Heartbeat(report.step)).directive
            except (Unreachable, OurFault) as error:
                self._tell("offline", f"training goes on without the coordinator: {error}")
                return "continue"

        return on_step

    def _deliver(self) -> int:
        """Upload what lies in the outbox and have it acknowledged: 1. If it is refused for good: 0."""
        session = self._require_session()
        work, update = session.current(), session.update
        assert update is not None
        try:
            self.transport.upload(work.id, self.journal.outbox)
            reply = self.transport.deliver(work.id, update)
        except (StaleUpdate, NotFound, Unauthorised):
            raise
        except TheirFault as error:
            self._drop(f"the update was refused: {error}")
            return 0
        self._save(sessions.delivered(session, reply.current_version))
        self.journal.clear_work()
        text = f"delivered rank {work.rank} from version {work.version}, loss {update.loss_after:.3f}"
        self._tell("delivered", text, loss=update.loss_after, version=work.version)
        return 1

    def _drop(self, reason: str) -> None:
        self._save(sessions.dropped(self._require_session()))
        self.journal.clear_work()
        self._tell("refused", f"work dropped, {reason}")

    def _back_off(self, error: EdgeError) -> None:
        """Wait twice as long as the last time, with jitter, up to a minute."""
        self._backoff_s = min(MAX_BACKOFF_S, max(1.0, 2 * self._backoff_s))
        wait_s = self._backoff_s * (0.5 + random.random() / 2)
        self._tell("offline", f"{error}; trying again in {wait_s:.0f} s")
        self._stop.wait(wait_s)

    # --- adapters ---

    def fetch(self, version: int, rank: int) -> Adapter:
        """A published version at a rank, downloaded at most once."""
        federation = self._require_session().federation
        path = self.journal.adapters / f"{federation.id}-{version}-{rank}.safetensors"
        if not path.exists():
            self.transport.download(version, rank, path)
            self.journal.forget_adapters(keep={path.name})
        return dict(codec.open_own(path, federation.scaling).modules())

    def newest(self, rank: int | None = None) -> tuple[int, Adapter | None]:
        """The newest version and its adapter: whole, or cut to `rank`. None for version 0."""
        status = self.transport.status()
        live = status.version_ranks.get(str(status.version), 0)
        if not live:
            return status.version, None
        return status.version, self.fetch(status.version, min(rank or live, live))

    # --- helpers ---

    def _require_session(self) -> Session:
        if self._session is None:
            raise InputError("not a member yet; call prepare() first")
        return self._session

    def _save(self, session: Session) -> None:
        self.journal.save(session)
        self._session = session

    def _tell(
        self,
        kind: Kind,
        text: str,
        step: int = 0,
        steps: int = 0,
        loss: float | None = None,
        version: int = 0,
    ) -> None:
        self._on_event(Event(kind, text, step, steps, loss, version))
