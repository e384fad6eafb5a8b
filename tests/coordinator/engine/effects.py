"""Events that tests give the engine, and the one effect that they expect of it."""

from __future__ import annotations

from typing import Any

from coordinator.engine.engine import Engine
from coordinator.engine.events import (
    Accept,
    Barred,
    Buffered,
    Decline,
    Effect,
    Event,
    Expired,
    Grant,
    Merge,
    Merged,
    Published,
    Restarted,
    Stored,
    Tell,
    Wait,
)

Said = Effect | Grant | Wait | Tell | Accept | Decline


def said(engine: Engine, event: Event[Any], now: float) -> list[Said]:
    """All that an event came to: what is to be done, and last the answer to whoever brought it."""
    done = engine.handle(event, now)
    # What a start finds, or the host wants no more, is declined without anybody to answer.
    may_decline = isinstance(event, Restarted | Merged | Barred)
    assert may_decline or not any(isinstance(effect, Decline) for effect in done.effects)
    assert done.answer is None or not isinstance(done.answer, Expired | Merge | Published)
    return [*done.effects, *([] if done.answer is None else [done.answer])]


def stored(update: str, device: str, version: int = 0, examples: int = 10) -> Stored:
    return Stored(Buffered(update, device, version, examples))


def merge(effects: list[Said]) -> Merge:
    assert len(effects) == 1, effects
    assert isinstance(effects[0], Merge), effects
    return effects[0]


def names(effect: Merge) -> list[str]:
    return [update.update for update, _, _ in effect.weights]
