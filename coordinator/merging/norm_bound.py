"""The bound on norms that a federation learns from its devices, and how fast it may move.

It is kept with every version, so a restart forgets nothing. Time is that of the running process: a clock that
was set a year forward moves no bound.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from coordinator.merging.admission import Admission, bound
from coordinator.merging.reach import fresh_sizes, reach
from coordinator.storage.store import Store
from edge_sdk.core.messages import Federation

DAY_S = 86400.0
TINY = 0.1  # of what one step of Adam reaches at the lowest rank: who sends less has not trained


class NormBound:
    """The learnt bound of a running coordinator. May be asked from any thread."""

    def __init__(
        self,
        federation: Federation,
        store: Store,
        choices: Admission,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._federation, self._store, self._choices, self._clock = federation, store, choices, clock
        newest = store.newest()
        self._kept = (newest.norm_bound if newest else None, clock())

    def now(self) -> float | None:
        """The longest change that is merged whole at present; None while too little is known.

        From one version's bound it moves by `daily_factor` a day at most, up or down, so that not even those
        who are the majority for a while can do much with it.
        """
        before, since = self._kept
        newest = self._store.newest()
        version = newest.version if newest else 0
        found = bound(
            self._store.latest_norms(self._choices.history), self._choices, tiny(self._federation, version)
        )
        if before is None or found is None:
            return before if found is None else found
        room = (self._clock() - since) / DAY_S * math.log(self._choices.daily_factor)
        return before * math.exp(min(room, max(-room, math.log(found / before))))

    def published(self, value: float | None) -> None:
        """A version was published with this bound."""
        self._kept = (value, self._clock())


def tiny(federation: Federation, version: int) -> float:
    """Below this norm an update says nothing of how much devices change that train from `version`."""
    rate = federation.training.learning_rate_at(version)
    squares = 0.0
    for shape in federation.base.modules.values():
        rank = min(federation.ladder[0], *shape)
        squares += reach(fresh_sizes(shape, rank), shape, rank, rate, federation.scaling).change ** 2
    return TINY * math.sqrt(squares)
