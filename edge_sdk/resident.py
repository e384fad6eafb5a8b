"""The base model in memory: loaded when it is needed, let go when the machine is somebody else's again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_sdk.turns import Turns

if TYPE_CHECKING:
    from edge_sdk.trainer import Trainer


class ResidentModel:
    """At most one loaded base. Loading and letting go take a turn, as training steps and answers do.

    Args:
        load: makes a trainer that takes turns by the `Turns` it is given.
    """

    def __init__(self, load: Callable[[Turns], Trainer]) -> None:
        self.turns = Turns()
        self._load = load
        self._trainer: Trainer | None = None
        self._asked_at = 0.0

    def trainer(self) -> Trainer:
        """The trainer, after loading the base if it is not here."""
        with self.turns:
            if self._trainer is None:
                self._trainer = self._load(self.turns)
            return self._trainer

    @property
    def loaded(self) -> bool:
        """Whether the base is in memory."""
        return self._trainer is not None

    def note_answer(self) -> None:
        """Somebody has just asked the model something, and may go on."""
        self._asked_at = time.monotonic()

    def let_go(self, unless_asked_s: float = 0.0) -> None:
        """Free its memory, after an answer in hand; not if somebody asked it in the last `unless_asked_s`."""
        if self._trainer is None or time.monotonic() - self._asked_at < unless_asked_s:
            return
        from edge_sdk import base_model

        with self.turns:
            self._trainer = None
            base_model.release_memory()
