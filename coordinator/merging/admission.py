"""Which updates come in, and how much of them: the norm of what a device changed, against recent ones.

The norm is that of the *product*, ‖D‖² = Σ over modules of ‖B̃A‖²_F, from small Gram matrices and never dense:
factors alone say nothing, because B̃·c and A/c are the same update. D is what a device *changed*; a state also
holds the global adapter, and its norm grows with that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coordinator.merging.robust import RobustName, lower_median
from edge_sdk.core.errors import AdapterError, InputError
from edge_sdk.core.lora import LoraFactors

# Of the product B̃·A of one module. No training comes near it; a sum of many such still fits in float32, so
# that nobody can make the global adapter overflow.
MAX_NORM = 1e6


@dataclass(frozen=True)
class Admission:
    """The host's choices on updates that are out of the ordinary."""

    over_norm: Literal["clip", "refuse"] = "clip"  # an update longer than the bound
    norm_factor: float = 5.0  # the learnt bound, as a multiple of the median of devices' latest norms
    history: int = 200  # devices that count in that median: those whose last update is newest
    history_least: int = 4  # devices from which on there is a learnt bound
    daily_factor: float = 10.0  # by which the learnt bound may move in a day, up or down
    reach_factor: float = 1.0  # the bound of always, as a multiple of what rate × steps can reach; reach.py
    robust: RobustName = "none"  # how a buffer is merged; see robust.py
    trimmed_share: float = 0.2  # of a buffer, for robust = "trimmed"

    def __post_init__(self) -> None:
        if not 1.0 <= self.norm_factor < math.inf:
            raise InputError(f"admission.norm_factor is {self.norm_factor}; it must be 1 or more")
        for name in ("daily_factor", "reach_factor"):
            if not 1.0 <= getattr(self, name) < math.inf:
                raise InputError(f"admission.{name} is {getattr(self, name)}; it must be 1 or more")
        if not 1 <= self.history_least <= self.history:
            raise InputError(
                f"admission.history_least is {self.history_least}; it must lie between 1 and "
                f"admission.history, {self.history}"
            )
        if not 0.0 < self.trimmed_share < 1.0:
            raise InputError(f"admission.trimmed_share is {self.trimmed_share}; it must lie between 0 and 1")


@dataclass(frozen=True)
class Norms:
    """‖D_m‖_F of what a device changed, for each module."""

    modules: Mapping[str, float]

    @property
    def total(self) -> float:
        """‖D‖ over all modules."""
        return math.hypot(*self.modules.values())

    @property
    def largest(self) -> str:
        """The module that changed most."""
        return max(self.modules, key=self.modules.__getitem__)


def measure(changes: Iterable[tuple[str, LoraFactors]]) -> Norms:
    """The norms of what a device changed, one module in memory at a time.

    Raises:
        AdapterError: a module's is above MAX_NORM, or that of one of its components.
    """
    found = {}
    for name, factors in changes:
        found[name] = _norm(factors)
        if not found[name] <= MAX_NORM:
            raise AdapterError(f"module {name} has norm {found[name]:.3g}, above {MAX_NORM:g}")
        if not _size(factors) <= MAX_NORM:
            raise AdapterError(f"module {name} has components above {MAX_NORM:g} that cancel each other")
    return Norms(found)


def _size(factors: LoraFactors) -> float:
    """The largest ‖b_i‖‖a_i‖ of a component: what is left in a sum of such that cancel is rounding."""
    with np.errstate(over="ignore", invalid="ignore"):
        sizes = np.linalg.norm(factors.b, axis=0) * np.linalg.norm(factors.a, axis=1)
    return float(np.nan_to_num(sizes, nan=0.0, posinf=np.inf).max(initial=0.0))


def _norm(factors: LoraFactors) -> float:
    """‖B̃A‖_F from float32 Gram matrices, to 1e-4 and mostly 1e-6: what is merged is worked out in float64.

    Where components cancel, or squares leave float32, from float64 ones: the error goes with ‖B̃‖²‖A‖².
    """
    b, a = factors.b, factors.a
    with np.errstate(over="ignore", invalid="ignore"):
        of_b, of_a = b.T @ b, a @ a.T
        squared, sizes = float(np.vdot(of_b, of_a)), (float(np.trace(of_b)), float(np.trace(of_a)))
    # A sum of squares well within float32 has no square of weight outside it.
    safe = all(1e-18 < size < 1e18 for size in sizes)
    if safe and squared * 10 * factors.rank > sizes[0] * sizes[1]:
        return math.sqrt(squared)
    return factors.norm()


def bound(latest: Sequence[float], choices: Admission, tiny: float = 0.0) -> float | None:
    """The longest change that is admitted whole: `norm_factor` × the median of the devices' latest norms.

    A device counts once, by its latest update, however often it hands in; and the median is the lower one. So
    half of the devices together cannot raise the bound above `norm_factor` × what the others send, however
    slowly they grow. An update that was clipped counts by what is left of it: where everybody's changes grow,
    as they may, the bound follows.

    Args:
        latest: the norm, as it is merged, of the newest accepted update of each device.
        choices: the host's.
        tiny: norms up to this are left out: who changes next to nothing does not say how much a device
            changes, and half of the devices could shrink what the others do, or take the bound away.

    Returns:
        None while fewer than `history_least` devices are left.
    """
    told = [norm for norm in latest if norm > tiny]
    if len(told) < choices.history_least:
        return None
    return choices.norm_factor * lower_median(told)


def admit(norms: Norms, limit: float | None, refuse: bool) -> float:
    """The factor in (0, 1] by which a change is merged: 1 within the bound, else what brings it down to it.

    Raises:
        AdapterError: it is above the bound, and `refuse`. Names norm, bound and the module that changed most.
    """
    if limit is None or norms.total <= limit:
        return 1.0
    if refuse:
        raise AdapterError(
            f"the update changes the model by {norms.total:.3g} (Frobenius norm), above the {limit:.3g} that "
            f"follows from other devices and from rate × steps; module {norms.largest} alone by "
            f"{norms.modules[norms.largest]:.3g}"
        )
    return limit / norms.total
