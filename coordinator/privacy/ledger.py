"""What each device has spent of its privacy, counted from the published versions in the store.

Nothing here is kept as a number of its own: a version and the updates in it are one row's transaction, and
the cost follows from them. A crash can neither lose a cost nor charge one for a merge that was never
published.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coordinator.engine.state import Ration
from coordinator.privacy import accountant
from coordinator.privacy.mechanism import Privacy
from coordinator.storage.rows import record_of
from coordinator.storage.store import Store
from edge_sdk.core.errors import InputError
from edge_sdk.core.records import encode


@dataclass(frozen=True)
class Spending:
    """ε at δ of the device that spent most, and how many versions its updates are in."""

    epsilon: float
    delta: float
    versions: int

    def __str__(self) -> str:
        return f"ε = {self.epsilon:.3g} at δ = {self.delta:g} (worst device, {self.versions} versions)"


def open_ledger(store: Store, chosen: Privacy | None, folder: Path) -> None:
    """Keep the choices of this start, for whoever looks at the folder later.

    Raises:
        InputError: versions here were published the other way: without noise, which nothing takes back, or
            with it, as the devices were told.
    """
    other_way = store.versions_with_noise(chosen is None)
    if other_way and chosen:
        raise InputError(
            f"{folder} holds {other_way} versions without noise; start [privacy] with another folder"
        )
    if other_way:
        raise InputError(
            f"{folder} holds {other_way} versions with differential privacy; restore the [privacy] of its "
            "configuration or use another folder"
        )
    store.set_meta("privacy", encode(chosen).decode() if chosen else "null")


def choices(store: Store) -> Privacy | None:
    """`[privacy]` of the newest start on this store, or None where there was none."""
    stored = store.meta("privacy")
    return None if stored in (None, "null") else record_of(Privacy, stored)


def worst(store: Store, delta: float) -> Spending:
    """The device that spent most; all 0 while no version holds anything."""
    spent = max(store.entered().values(), key=accountant.precision, default={})
    return Spending(accountant.epsilon(spent, delta), delta, sum(spent.values()))


def ration(store: Store, chosen: Privacy) -> Ration:
    """How often each device may still take part."""
    if chosen.max_epsilon is None:
        return Ration()

    def left(spent: accountant.Spent) -> int:
        assert chosen.max_epsilon is not None
        return accountant.entries_left(spent, chosen.noise_multiplier, chosen.delta, chosen.max_epsilon)

    return Ration(left({}), {device: left(spent) for device, spent in store.entered().items()})


def over_ration(store: Store, allowed: Ration) -> list[str]:
    """Ids of acknowledged updates that no version may take: the budget was lowered since."""
    waiting: dict[str, int] = {}
    over = []
    for stored in store.unmerged():
        if allowed.is_spent(stored.device, waiting.get(stored.device, 0)):
            over.append(stored.id)
        else:
            waiting[stored.device] = waiting.get(stored.device, 0) + 1
    return over
