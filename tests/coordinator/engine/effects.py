"""Events that tests give the engine, and the one effect that they expect of it."""

from __future__ import annotations

from coordinator.engine.events import Buffered, Effect, Merge, Stored


def stored(update: str, device: str, version: int = 0, examples: int = 10) -> Stored:
    return Stored(Buffered(update, device, version, examples))


def merge(effects: list[Effect]) -> Merge:
    assert len(effects) == 1, effects
    assert isinstance(effects[0], Merge), effects
    return effects[0]


def names(effect: Merge) -> list[str]:
    return [update.update for update, _, _ in effect.weights]
