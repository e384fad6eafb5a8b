"""What an embedding application is told, and that its mistakes in listening harm no training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge_sdk.core.words import printable
from edge_sdk.options import Event, Kind
from edge_sdk.system.terminal import MOST, logger

log = logger("edge_sdk")

PAUSED = "paused: "  # begins the text of that event; the reason follows


@dataclass(frozen=True)
class Callbacks:
    """Called in the agent's thread; an exception in one is logged and training goes on.

    Args:
        on_progress: after every training step, with step, steps, loss and version.
        on_pause: training waits; the reason.
        on_resume: it goes on.
        on_new_adapter: a newer version of the global adapter is there; `generate` answers with it.
    """

    on_progress: Callable[[Event], None] | None = None
    on_pause: Callable[[str], None] | None = None
    on_resume: Callable[[], None] | None = None
    on_new_adapter: Callable[[int], None] | None = None


class Teller:
    """Passes each event on to whoever wants it."""

    def __init__(self, on_event: Callable[[Event], None] | None, callbacks: Callbacks | None) -> None:
        self._on_event = on_event or _log
        self._callbacks = callbacks or Callbacks()

    def __call__(
        self,
        kind: Kind,
        text: str,
        step: int = 0,
        steps: int = 0,
        loss: float | None = None,
        version: int = 0,
    ) -> None:
        """Tell an event, and call the callback that its kind has."""
        text = printable(text, MOST)
        event = Event(kind, text, step, steps, loss, version)
        _call(self._on_event, event)
        if kind == "step":
            _call(self._callbacks.on_progress, event)
        elif kind == "paused":
            _call(self._callbacks.on_pause, text.removeprefix(PAUSED))
        elif kind == "resumed":
            _call(self._callbacks.on_resume)
        elif kind == "adapter":
            _call(self._callbacks.on_new_adapter, version)


def _log(event: Event) -> None:
    """Where nobody listens, the log does; steps are for progress bars."""
    log.log(logging.DEBUG if event.kind == "step" else logging.INFO, "%s", event.text or event)


def _call(function: Callable[..., None] | None, *arguments: Any) -> None:
    """Call the application; its failure is its own."""
    if function is None:
        return
    try:
        function(*arguments)
    except Exception:
        log.exception("a callback of the application failed; training goes on")
