"""What memory predictions were worth on this device, and what to predict after one was wrong.

A `Correction` is the factor by which predictions for one base model on one device and dtype are multiplied.
It is pure; `Corrections` is the file that keeps it. The next setting is the chooser's, from corrected
predictions. How the factor moves:

- After a failure it rises at once to `FAILURE_MARGIN` times what that proved: the setting was predicted
  to fit, so that the true peak was at least the budget. That setting no longer fits.
- After a success it moves a quarter of the way down to measured / predicted, or at once up to it: too little
  memory costs a run, too much only a rank.
- A failure is remembered. Success at a smaller setting pulls the factor down to a floor at most: what the
  failure proved, eased by `EASING` with every success. Otherwise the setting that failed would be tried again
  after a few small successes, and fail again.
- Not only the prediction may be wrong, but the budget: somebody else may hold the memory. What was predicted
  to fit and did not is a limit of its own (`most_bytes`), which every success raises by 2 %.
- It stays within [LOWEST, HIGHEST]. Above the highest, the prediction says nothing any more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from edge_sdk.core.errors import ProtocolError, Unwritable
from edge_sdk.core.records import decode, to_json
from edge_sdk.system.durable import write_durably
from edge_sdk.system.terminal import logger

log = logger(__name__)

FAILURE_MARGIN = (
    1.1  # the least that a failure raises the factor by, over what it proved and over what it was
)
SMOOTHING = 0.25
EASING = 0.98  # of what a failure proved beyond 1, kept after each success: half of it after 34
LOWEST, HIGHEST = 0.5, 8.0


@dataclass(frozen=True)
class Correction:
    """measured / predicted peak, as far as is known. `floor`: what the failures have proved, eased since."""

    factor: float = 1.0
    floor: float = LOWEST
    failures: int = 0
    successes: int = 0
    failed_bytes: int = 0  # the least (uncorrected) prediction that memory ran out at; 0: none did

    def apply(self, predicted_bytes: int) -> int:
        """The corrected prediction, to be compared with the budget."""
        return round(predicted_bytes * self.factor)

    def after_failure(self, predicted_bytes: int, budget_bytes: int) -> Correction:
        """Memory ran out at a setting of this (uncorrected) prediction, within this budget.

        `apply(predicted_bytes)` is above `budget_bytes` from now on, unless the factor is at its highest.
        """
        proved = budget_bytes / max(1, predicted_bytes)
        factor = _clamped(FAILURE_MARGIN * max(self.factor, proved))
        failed = min(self.failed_bytes or predicted_bytes, predicted_bytes)
        return replace(self, factor=factor, floor=factor, failures=self.failures + 1, failed_bytes=failed)

    @property
    def most_bytes(self) -> int | None:
        """What a (corrected) prediction may be, below the one that failed; None if none did."""
        return self.apply(self.failed_bytes) - 1 if self.failed_bytes else None

    def after_success(self, predicted_bytes: int, measured_bytes: int) -> Correction:
        """A run of this (uncorrected) prediction took this much at its peak."""
        found = measured_bytes / max(1, predicted_bytes)
        floor = self.floor
        if self.failures:
            floor = _clamped(1 + (self.floor - 1) * EASING if self.floor > 1 else self.floor)
        factor = max(found, self.factor + SMOOTHING * (found - self.factor), floor)
        failed = round(self.failed_bytes * (2 - EASING))
        successes = self.successes + 1
        return replace(self, factor=_clamped(factor), floor=floor, successes=successes, failed_bytes=failed)

    @property
    def exhausted(self) -> bool:
        """Whether no failure can raise it any more: decline rather than try again."""
        return self.factor >= HIGHEST


def _clamped(factor: float) -> float:
    return min(HIGHEST, max(LOWEST, factor))


# --- kept over restarts ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    corrections: dict[str, Correction] = field(default_factory=dict)


class Corrections:
    """The corrections of a state folder, in `memory.json`, one for each (base fingerprint, device, dtype)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._read()

    def of(self, fingerprint: str, device: str, dtype: str) -> Correction:
        """What is known; a factor of 1 where nothing is."""
        return self._known.get(_key(fingerprint, device, dtype), Correction())

    def keep(self, fingerprint: str, device: str, dtype: str, correction: Correction) -> None:
        """Remember, durably; where the disk is full, until the process ends."""
        self._known[_key(fingerprint, device, dtype)] = correction
        content = json.dumps(to_json(_File(self._known)), indent=1, sort_keys=True)
        try:
            write_durably(self._path, content.encode() + b"\n")
        except Unwritable as error:
            log.warning("%s; the correction is kept in memory", error)

    def _read(self) -> dict[str, Correction]:
        """The file; one that cannot be read is logged and begun anew, for it can be learnt again."""
        try:
            found = decode(_File, self._path.read_bytes()).corrections
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, ProtocolError) as error:
            log.warning("%s cannot be read (%s); memory corrections begin anew", self._path, error)
            return {}
        return {
            key: replace(c, factor=_clamped(c.factor), floor=_clamped(c.floor)) for key, c in found.items()
        }


def _key(fingerprint: str, device: str, dtype: str) -> str:
    return f"{fingerprint}/{device}/{dtype}"
