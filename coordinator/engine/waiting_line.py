"""Devices that wait: who is next for a free slot, and when each is told to come back.

Two promises. Fair: a slot goes to the device that has waited longest among those that still come back, so
that a fast neighbour cannot take every one. Calm: however many wait, about `MOST_ASKS_S` ask in a second, and
never all at once, because each is told another moment.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

MOST_ASKS_S = 200.0  # questions a second from devices without work: some percent of what a core answers
MOST_RETRY_S = 300.0
FRONT_SHARE = 0.5  # of those questions are for the front of the line, whose slot must not wait for it
JITTER = 0.5  # a device is told up to this share more, so that devices told at once come back apart
ABSENCE_S = 10.0  # who comes so much later than told has lost its place, and something for its own delay
ABSENCE_SHARE = 0.5


@dataclass
class WaitingLine:
    """All devices that were told to wait. Bounded by the devices that there are."""

    back_by: dict[str, float] = field(default_factory=dict)  # later than this one is taken for absent
    tickets: dict[str, int] = field(default_factory=dict)  # of those in line for a slot, first come first
    issued: int = 0
    swept_at: float = 0.0

    def has_turn(self, device: str, free: int, now: float) -> bool:
        """Whether one of `free` slots is for this device: fewer than that wait before it."""
        before, absent = 0, []
        for other in self.tickets:
            if other == device or before >= free:
                break
            if now > self.back_by[other]:
                absent.append(other)
            else:
                before += 1
        for other in absent:
            self.leave(other)
        return before < free

    def wait_for_slot(self, device: str, slots: int, retry_s: float, seed: str, now: float) -> float:
        """Put a device in line, or leave it where it is; seconds until it should ask again.

        Who is near the front comes back often, who is far behind rarely.
        """
        self._sweep(now)
        if device not in self.tickets:
            self.issued += 1
            self.tickets[device] = self.issued
        before = self.tickets[device] - next(iter(self.tickets.values()))
        in_front = before < FRONT_SHARE * MOST_ASKS_S * retry_s
        return self.wait(device, min(MOST_RETRY_S, retry_s * (1 + before / slots)), seed, now, not in_front)

    def wait(self, device: str, at_least_s: float, seed: str, now: float, calmly: bool = True) -> float:
        """Note that a device waits; seconds until it should ask again, `calmly`: the more wait, the more.

        The jitter follows from `seed`, a fresh random text: nothing here draws a number.
        """
        self._sweep(now)
        calm_s = min(MOST_RETRY_S, len(self.back_by) / MOST_ASKS_S) if calmly else 0.0
        share = zlib.crc32(seed.encode()) / 2**32
        retry_s = max(at_least_s, calm_s) * (1 + JITTER * share)
        self.back_by[device] = now + (1 + ABSENCE_SHARE) * retry_s + ABSENCE_S
        return retry_s

    def leave(self, device: str) -> None:
        """The device waits no more."""
        self.back_by.pop(device, None)
        self.tickets.pop(device, None)

    def _sweep(self, now: float) -> None:
        """Forget, now and then, who never came back: it would make the others wait longer."""
        if now - self.swept_at < ABSENCE_S:
            return
        self.swept_at = now
        for device in [device for device, back_by in self.back_by.items() if now > back_by]:
            self.leave(device)
