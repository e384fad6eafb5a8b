"""The model that a device gets back: the base with the newest global adapter, for people to ask."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from edge_sdk.core.errors import OurFault, Unreachable
from edge_sdk.core.lora import Adapter
from edge_sdk.membership.adapter_cache import AdapterCache, AdapterKey
from edge_sdk.membership.membership import Membership
from edge_sdk.participation.resident_model import ResidentModel
from edge_sdk.system.backoff import asked_by
from edge_sdk.worker.messages import Question

FRESH_S = 2.0  # how long a version that was asked for is taken for the newest
OFFLINE_S = 15.0  # … and how long a coordinator that did not answer is left alone


class Assistant:
    """Answers by the newest version that can be had, from any thread, while training is under way or not."""

    def __init__(
        self,
        membership: Membership,
        adapters: AdapterCache,
        model: ResidentModel,
        clock: Callable[[], float],
    ) -> None:
        self._membership, self._adapters, self._model = membership, adapters, model
        self._clock = clock
        self._refreshing = threading.Lock()
        self._newest = AdapterKey()
        self._due = 0.0
        self.online = True

    def refresh(self, stopping: Callable[[], bool] | None = None) -> int:
        """Look for a newer version and have it on this device's disk; its number. 0: the base alone.

        Raises:
            Unreachable: nobody answers, and this device was never a member.
            TransferStopped: `stopping` said so in the middle of a download.
        """
        with self._refreshing:
            if self._clock() >= self._due:
                self._membership.recall()
                try:
                    self._newest = self._ask(stopping)
                    self.online, wait_s = True, FRESH_S
                except (Unreachable, OurFault) as error:
                    self._newest = max(self._newest, self._adapters.newest_on_disk())
                    self.online, wait_s = False, max(OFFLINE_S, asked_by(error))
                self._due = self._clock() + wait_s
            return self._newest.version

    def _ask(self, stopping: Callable[[], bool] | None) -> AdapterKey:
        """The newest version at its rank, downloaded."""
        newest = self._look()
        if newest.rank:
            self._adapters.have(newest, "answer", stopping)
        return newest

    def _look(self) -> AdapterKey:
        """What the coordinator publishes now."""
        said = self._membership.transport.newest()
        newest = AdapterKey(said.version, said.rank, said.start)
        self._adapters.heard(newest)
        return newest

    def newest(self, rank: int | None = None) -> tuple[int, Adapter | None]:
        """The newest version and its adapter: whole, or cut to `rank`. None for version 0."""
        self._membership.connect()
        newest = self._look()
        if not newest.rank:
            return newest.version, None
        cut = replace(newest, rank=min(rank or newest.rank, newest.rank))
        return newest.version, self._adapters.fetch(cut, "answer")

    def load(self) -> None:
        """The base into memory, and the newest version onto the disk."""
        self.refresh()
        self._model.ask(lambda worker: [])

    def generate(self, prompt: str, max_new_tokens: int, on_text: Callable[[str], None] | None) -> str:
        """Greedy answer to `prompt`; waits at most for one training step, and for the base to load."""
        self.refresh()
        newest = self._newest
        adapter = str(self._adapters.have(newest, "answer")) if newest.rank else None
        question = Question((prompt,), max_new_tokens, adapter)
        return self._model.ask(lambda worker: worker.generate(question, on_text))[0]
