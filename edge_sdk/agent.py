"""The device's life in a federation, and what an application embeds.

    from edge_sdk import Agent

    agent = Agent("flexlora+https://host:8765/#TOKEN.PIN", data="notes.jsonl")
    agent.start()      # trains in a thread of its own until agent.stop()
    agent.generate("turn the light on")

`participation.loop` has the loop. Everything that must survive a crash is in a journal, and training rests
whenever the owner's conditions say so. The text stays here: only LoRA factors, example counts and losses
leave the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.callbacks import Callbacks, Teller
from edge_sdk.connection.transport import Transport
from edge_sdk.core.choice.rank import RankChoice
from edge_sdk.core.errors import EdgeError, InputError
from edge_sdk.core.invitation import is_invitation, parse
from edge_sdk.core.lora import Adapter
from edge_sdk.core.messages import Federation
from edge_sdk.membership.journal import Journal
from edge_sdk.membership.membership import Membership
from edge_sdk.options import Event, Options
from edge_sdk.participation.collaborators import Collaborators
from edge_sdk.participation.loop import Participation
from edge_sdk.system import priority
from edge_sdk.system.terminal import logger

log = logger("edge_sdk")


@dataclass(frozen=True)
class Stopping:
    """What `Agent.stop` found: whether the run has ended, and if not, what it still waits for."""

    done: bool
    waiting_for: str = ""


class Agent:
    """One device in one federation. Every method may be called from any thread.

    Args:
        url: an invitation, or the coordinator's address, which is enough once this device has joined.
        data: JSONL file with this device's own text; None only to fetch adapters and to answer.
        join_token: lets this device in, beside an address.
        options: see Options.
        on_event: called with each Event, in the agent's thread.
        callbacks: see Callbacks; likewise.
        collaborators: the clock, the worker and the measurements that it works with, if not the usual ones.

    Raises:
        InputError: the invitation is none or stands beside a join token, or the state folder cannot be one.
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
        collaborators: Collaborators | None = None,
    ) -> None:
        invitation = parse(url) if is_invitation(url) else None
        if invitation and join_token:
            raise InputError("an invitation brings its own token; leave out join_token")
        self.url = invitation.url if invitation else url.rstrip("/")
        self.options = options or Options()
        self._tell = Teller(on_event, callbacks)
        token, pin = (invitation.token, invitation.pin) if invitation else (join_token, "")
        self._membership = Membership(self.url, self.options, token, self._tell, pin)
        self._part = Participation(
            self._membership, Path(data) if data is not None else None, collaborators or Collaborators()
        )
        self._ended = threading.Event()
        self._ended.set()
        self._running = threading.Lock()
        self._runner: int | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    # --- life ---

    def start(self) -> None:
        """Run in a thread of its own, one however often called. A failure is logged; `stop` raises it."""
        stopping = self._part.stopping
        if self._thread is not None and self._thread.is_alive():
            if self._runner == threading.get_ident():
                stopping.clear()  # a callback has changed its mind
            if not stopping.is_set():
                return
            self._thread.join()  # a run that was told to stop ends first
        stopping.clear()
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
        self._part.stopping.set()

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
            return Stopping(False, self._part.activity or "the run to end")
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return Stopping(True)

    def pause(self) -> None:
        """Leave off after the step in hand: write a checkpoint, free the model's memory, wait to `resume`."""
        self._part.watch.pause()

    def resume(self) -> None:
        """Take `pause` back. The conditions of the options still count."""
        self._part.watch.resume()

    def run(self, updates: int | None = None) -> int:
        """Take part until `stop()`, or until `updates` more updates are delivered; returns how many were.

        Without data it follows the federation: newer versions are downloaded as they come.

        Raises:
            InputError: the data, the model or the memory are not enough; nothing was sent.
            Unreachable: the coordinator could not be reached to join. A device that has joined waits for it.
            TheirFault: this device was refused (wrong token, wrong base model).
        """
        if not self._running.acquire(blocking=False):
            raise InputError("this agent runs already; one run at a time")
        self._ended.clear()
        self._runner = threading.get_ident()
        try:
            done = self._part.run(updates)
        except EdgeError:
            self._membership.close()
            raise
        finally:
            self._runner = None
            self._ended.set()
            self._running.release()
        self._tell("stopped", f"stopped after {done} updates")
        return done

    def prepare(self) -> RankChoice:
        """Everything before the first assignment: read the data, join, choose the rank, load the base."""
        try:
            return self._part.prepare()
        except EdgeError:
            self._membership.close()
            raise

    def close(self) -> None:
        """Hang up, and let go of the model. A later `run` of a new Agent goes on where this one was."""
        self._membership.close()
        self._part.model.let_go()

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
        return self._part.assistant.generate(prompt, max_new_tokens, on_text)

    def load(self) -> None:
        """Have the base in memory already when `generate` is called; with or without a connection.

        Raises:
            Unreachable, TheirFault: as `generate`.
        """
        self._part.assistant.load()

    def refresh(self) -> int:
        """Look for a newer version of the global adapter; the version that `generate` answers with."""
        return self._part.assistant.refresh()

    @property
    def online(self) -> bool:
        """Whether the coordinator answered when it was last asked for the newest version."""
        return self._part.assistant.online

    def newest(self, rank: int | None = None) -> tuple[int, Adapter | None]:
        """The newest version and its adapter: whole, or cut to `rank`. None for version 0."""
        return self._part.assistant.newest(rank)

    # --- what this device is ---

    @property
    def journal(self) -> Journal:
        """What survives a crash."""
        return self._membership.journal

    @property
    def choice(self) -> RankChoice:
        """The rank that was chosen, and why."""
        return self._part.setting.choice

    @property
    def federation(self) -> Federation:
        """What this device takes part in."""
        return self._membership.federation

    @property
    def transport(self) -> Transport:
        """The connection, once prepared."""
        return self._membership.transport
