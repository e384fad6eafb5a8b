"""The device's life in a federation, and what an application embeds.

    from edge_sdk import Agent

    agent = Agent("http://localhost:8765", data="notes.jsonl", join_token="…")
    agent.start()      # trains in a thread of its own until agent.stop()
    agent.generate("turn the light on")

join → ask → download → train → upload → deliver → ask …, with everything that must survive a crash in a journal,
and a rest whenever the owner's conditions say so. The text stays here: only LoRA factors, example counts and
losses leave the device.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk import enrolment, manners, priority
from edge_sdk import session as sessions
from edge_sdk.assignment_run import AssignmentRun
from edge_sdk.callbacks import PAUSED, Callbacks, Teller
from edge_sdk.core import memory
from edge_sdk.core.errors import EdgeError, InputError, NotFound, OurFault, StaleUpdate, Unreachable
from edge_sdk.core.lora import Adapter
from edge_sdk.core.messages import Ask, Federation, NotNow
from edge_sdk.journal import Journal
from edge_sdk.membership import Membership
from edge_sdk.options import Event, Options
from edge_sdk.published import PublishedAdapters
from edge_sdk.resident import ResidentModel
from edge_sdk.serving import Serving
from edge_sdk.surroundings import Watch
from edge_sdk.transport import TransferStopped, Transport

if TYPE_CHECKING:
    from edge_sdk.dataset import Tokenised
    from edge_sdk.trainer import Trainer
    from edge_sdk.turns import Turns

log = logging.getLogger("edge_sdk")

MAX_BACKOFF_S = 60.0
SLICE_S = 0.25  # a waiting agent hears a pause or the end of one this soon
FOLLOW_S = 10.0  # how often a device without data looks for a newer version
LINGER_S = 60.0  # a paused device keeps a base that was loaded to answer somebody this long after the answer


@dataclass(frozen=True)
class Stopping:
    """What `Agent.stop` found: whether the run has ended, and if not, what it still waits for."""

    done: bool
    waiting_for: str = ""


class Agent:
    """One device in one federation. Every method may be called from any thread.

    Args:
        url: the coordinator's address.
        data: JSONL file with this device's own text; None only to fetch adapters and to answer.
        join_token: the federation's; needed until this device has joined once.
        options: see Options.
        on_event: called with each Event, in the agent's thread.
        callbacks: see Callbacks; likewise.
    """

    def __init__(
        self,
        url: str,
        *,
        data: Path | str | None = None,
        join_token: str | None = None,
        options: Options | None = None,
        on_event: Callable[[Event], None] | None = None,
        callbacks: Callbacks | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.options = options or Options()
        self._data = Path(data) if data is not None else None
        self._tell = Teller(on_event, callbacks)
        self._membership = Membership(self.url, self.options, join_token, self._tell)
        self._watch = Watch(self.options.conditions)
        # A device that trains and a program that only asks may share a state folder, but no downloads.
        folder = self.journal.adapters if self._data else self.journal.folder / "served"
        self._published = PublishedAdapters(self._membership, folder)
        self._model = ResidentModel(self._load)
        self._serving = Serving(self._membership, self._published, self._model)
        self._work = AssignmentRun(self._membership, self._published, self._interrupted)
        self._examples: list[Tokenised] = []
        self._choice: memory.RankChoice | None = None
        self._backoff_s = 0.0
        self._stop, self._ended = threading.Event(), threading.Event()
        self._ended.set()
        self._running = threading.Lock()
        self._runner: int | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._activity = ""

    # --- life ---

    def start(self) -> None:
        """Run in a thread of its own, once however often called. A failure is logged, and `stop` raises it."""
        if self._thread is not None and self._thread.is_alive() and not self._stop.is_set():
            return
        if self._thread is not None:
            self._thread.join()  # a run that was told to stop ends first
        self._stop.clear()
        self._ended.clear()
        self._failure = None
        self._thread = threading.Thread(target=self._run_in_thread, name="edge-sdk", daemon=True)
        self._thread.start()

    def _run_in_thread(self) -> None:
        try:
            priority.lower_thread(self.options.nice)
            self.run()
        except EdgeError as error:
            self._failure = error
            log.error("%s", error)
        except Exception as error:
            self._failure = error
            log.exception("the agent has ended")
        finally:
            self._ended.set()

    def request_stop(self) -> None:
        """Ask a run in any thread to end after the training step in hand. Returns at once; signal-safe."""
        self._stop.set()

    def stop(self, timeout_s: float = 2.0) -> Stopping:
        """End the run; its work goes on from a checkpoint next time. Returns within `timeout_s`.

        A training step, a loading model and an answer of the coordinator are waited for, not cut off: where
        that takes longer, the record names it, the run ends by itself later, and `stop` may be called again.

        Raises:
            EdgeError: what ended the run by itself before.
        """
        self.request_stop()
        if self._runner == threading.get_ident():
            return Stopping(False, "the callback that called stop")
        if not self._ended.wait(timeout_s):
            return Stopping(False, self._activity or "the run to end")
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return Stopping(True)

    def pause(self) -> None:
        """Leave off after the step in hand: write a checkpoint, free the model's memory, wait for `resume`."""
        self._watch.pause()

    def resume(self) -> None:
        """Take `pause` back. The conditions of the options still count."""
        self._watch.resume()

    def run(self, updates: int | None = None) -> int:
        """Take part until `stop()`, or until `updates` more updates are delivered; returns how many were.

        Without data it follows the federation: newer versions are downloaded as they come.

        Raises:
            InputError: the data, the model or the memory are not enough; nothing was sent.
            Unreachable: the coordinator could not be reached on the very first call. Later it is waited for.
            TheirFault: this device was refused (wrong token, wrong base model).
        """
        if not self._running.acquire(blocking=False):
            raise InputError("this agent runs already; one run at a time")
        self._ended.clear()
        self._runner = threading.get_ident()
        try:
            return self._take_part(updates)
        finally:
            self._runner = None
            self._ended.set()
            self._running.release()

    def prepare(self) -> Trainer:
        """Everything before the first assignment: read the data, join, choose the rank, load the base."""
        try:
            self._enrol()
            with self._doing("the base model to load"):
                return self._ready()
        except EdgeError:
            self._membership.close()
            raise

    def close(self) -> None:
        """Hang up, and let go of the model. A later `run` of a new Agent goes on where this one was."""
        self._membership.close()
        self._model.let_go()

    # --- the model it gets back ---

    def generate(
        self, prompt: str, max_new_tokens: int = 256, on_text: Callable[[str], None] | None = None
    ) -> str:
        """Answer by the base with the newest global adapter; whether training is under way or not.

        A training step in hand is waited for, and training goes on after the answer. While training is
        paused the base is loaded for the answer and let go a minute after the last one. Without a connection
        the newest adapter on this device answers. `on_text` hears the answer in pieces, in this thread.

        Raises:
            Unreachable: nobody answers, and this device was never a member.
            TheirFault: this device was refused.
        """
        return self._serving.generate(prompt, max_new_tokens, on_text)

    def refresh(self) -> int:
        """Look for a newer version of the global adapter; the version that `generate` answers with."""
        return self._serving.refresh()

    @property
    def online(self) -> bool:
        """Whether the coordinator answered when it was last asked for the newest version."""
        return self._serving.online

    def newest(self, rank: int | None = None) -> tuple[int, Adapter | None]:
        """The newest version and its adapter: whole, or cut to `rank`. None for version 0."""
        return self._serving.newest(rank)

    # --- what this device is ---

    @property
    def journal(self) -> Journal:
        """What survives a crash."""
        return self._membership.journal

    @property
    def choice(self) -> memory.RankChoice:
        """The rank that was chosen, and why."""
        if self._choice is None:
            raise InputError("the rank is chosen when the agent has prepared; call prepare() first")
        return self._choice

    @property
    def federation(self) -> Federation:
        """What this device takes part in."""
        return self._membership.federation

    @property
    def transport(self) -> Transport:
        """The connection, once prepared."""
        return self._membership.transport

    # --- getting ready ---

    def _enrol(self) -> None:
        """All that needs no weights: check the data, join, choose the rank."""
        from edge_sdk import dataset

        if self._data and self._choice is None:
            dataset.load_examples(self._data)
        with self._doing("an answer of the coordinator, or the check of the base model"):
            self._membership.connect()
        if self._data and self._choice is None:
            self._choice = enrolment.choose_rank(self.federation, self.options)
            self._tell("rank", self._choice.reason)
        for what in manners.unmeasured(self.options.conditions, self._watch.look()):
            self._tell("notice", f"this machine does not tell {what}; that condition holds nothing back")

    def _ready(self) -> Trainer:
        """The base in memory, and the data in its tokens."""
        from edge_sdk import dataset

        trainer = self._model.trainer()
        if self._data and not self._examples:
            length = self.federation.training.sequence_len
            raw = dataset.load_examples(self._data)
            self._examples = [dataset.tokenise(example, trainer.base.tokenizer, length) for example in raw]
        return trainer

    def _load(self, turns: Turns) -> Trainer:
        from edge_sdk import base_model, trainer

        base_model.use_threads(self.options.threads)
        federation = self.federation
        model = enrolment.model_of(federation, self.options)
        base = base_model.load(model, device=self.options.device, quantise=self.options.quantise)
        return trainer.Trainer(
            base, federation.base.modules, federation.scaling, self.options.progress, turns
        )

    # --- the loop ---

    def _take_part(self, updates: int | None) -> int:
        try:
            self._enrol()
        except EdgeError:
            self._membership.close()
            raise
        done = 0
        while not self._stop.is_set() and (updates is None or done < updates):
            if (reason := self._watch.reason()) is not None:
                self._pause(reason)
                continue
            try:
                done += self._step()
                self._backoff_s = 0.0
            except (Unreachable, OurFault) as error:
                self._back_off(error)
        self._tell("stopped", f"stopped after {done} updates")
        return done

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
        with self._doing("the base model to load"):
            self._ready()
        if self._interrupted():
            return
        with self._doing("an answer of the coordinator"):
            answer = self.transport.ask(Ask(self.choice.rank))
        if isinstance(answer, NotNow):
            self._tell("waiting", answer.reason)
            # Up to a quarter more, so that devices told the same do not come back together.
            self._rest(answer.retry_after_s * (1 + random.random() / 4))
            return
        self.journal.clear_work()
        self._membership.save(sessions.assigned(self._membership.session, answer, self.choice.micro_batch))

    def _train(self) -> None:
        with self._doing("the base model to load"):
            trainer = self._ready()
        if not self._interrupted():
            with self._doing("the training step in hand"):
                self._work.train(trainer, self._examples)

    def _follow(self) -> None:
        """A device without data: have the newest version here, and look again later."""
        with self._doing("a download"):
            version = self._serving.refresh()
        self._membership.heard_of(version)
        self._rest(FOLLOW_S)

    def _interrupted(self) -> bool:
        """Whether to leave off now: to stop, or to pause."""
        return self._stop.is_set() or self._watch.reason() is not None

    def _pause(self, reason: str) -> None:
        """Let go of the model and wait until training may go on, or is told to stop."""
        with self._doing("an answer of the model"):
            self._model.let_go()
        self._tell("paused", PAUSED + reason)
        while not self._stop.wait(SLICE_S) and self._watch.reason() is not None:
            with self._doing("an answer of the coordinator"):
                self._work.beat_while_paused()
            self._model.let_go(unless_asked_s=LINGER_S)
        if not self._stop.is_set():
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
            self._stop.wait(min(left, SLICE_S))

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """While inside, a `stop` that has to wait says that it waits for `what`."""
        self._activity = what
        try:
            yield
        finally:
            self._activity = ""
