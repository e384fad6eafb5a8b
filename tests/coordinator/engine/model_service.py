"""A coordinator without HTTP and SQLite, for tests of the engine: it answers as service.py and store.py do.

Whatever the real one awaits is a `yield` here, so that a test can stop, reorder or kill it at each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from coordinator.engine.engine import Engine
from coordinator.engine.events import (
    Asked,
    Barred,
    Beat,
    Buffered,
    BytesArrived,
    Decline,
    Event,
    Expired,
    Grant,
    Lease,
    Merge,
    Merged,
    MergeFailed,
    Offered,
    Refused,
    Restarted,
    Revert,
    RevertWanted,
    Stored,
    Tick,
    Wait,
)
from coordinator.engine.policy import Policy
from coordinator.engine.state import Ration
from tests.coordinator.engine.effects import Said, said

Answer = tuple[Any, ...]
Job = Generator[None, None, Answer]
KEPT_PACES = 8


@dataclass
class Work:
    """A row of an assignment."""

    device: str
    version: int
    rank: int
    carry_rank: int
    steps: int
    expires_in_s: float
    granted_wall: float
    open: bool = True


@dataclass
class Kept:
    """A row of an update."""

    device: str
    version: int
    examples: int
    steps: int
    received_wall: float
    merged: int | None = None
    rejected: str | None = None


@dataclass
class Disk:
    """What a restart finds: rows, each written whole or not at all."""

    work: dict[str, Work] = field(default_factory=dict)
    updates: dict[str, Kept] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)  # of version 1, 2, ...
    back: list[tuple[int, int]] = field(default_factory=list)  # (to, version) of those that reverted

    def add_work(self, id: str, work: Work) -> None:
        """Twice is the same as once."""
        if id in self.work:
            return
        for other in self.work.values():
            other.open &= other.device != work.device
        self.work[id] = work

    def add_update(self, id: str, kept: Kept) -> bool | str:
        """Whether it is new, or why it is refused."""
        if id in self.updates:
            return False
        for other in self.updates.values():
            if other.device == kept.device and other.version >= kept.version and other.rejected is None:
                return "once from each version"
        self.updates[id] = kept
        self.work[id].open = False
        return True

    def reject(self, id: str, reason: str) -> None:
        assert reason
        assert self.updates[id].merged is None
        self.updates[id].rejected = reason

    def publish(self, merge: Merge, rank: int) -> None:
        assert merge.version == len(self.ranks) + 1
        self.ranks.append(rank)
        for update, _, _ in merge.weights:
            kept = self.updates[update.update]
            assert kept.merged is None
            assert kept.rejected is None
            kept.merged = merge.version

    def publish_revert(self, revert: Revert) -> None:
        assert 0 <= revert.to < revert.version == len(self.ranks) + 1
        self.ranks.append(self.ranks[revert.to - 1] if revert.to else 0)
        self.back.append((revert.to, revert.version))
        for kept in self.updates.values():
            if kept.version > revert.to and kept.merged is None and kept.rejected is None:
                kept.rejected = "taken back"

    def bar(self, device: str) -> None:
        """As `Store.set_standing` does, of one who takes part no more."""
        for id, work in self.work.items():
            if work.device == device:
                work.open = False
                if (kept := self.updates.get(id)) and kept.merged is None and kept.rejected is None:
                    kept.rejected = "barred"

    def entered(self, device: str) -> int:
        """Versions that hold an update of a device."""
        return sum(u.device == device and u.merged is not None for u in self.updates.values())

    def recalled(self, now: float, wall: float) -> Restarted:
        """As recalling.py reads it."""
        unmerged = [(u.received_wall, id) for id, u in self.updates.items() if not (u.merged or u.rejected)]
        given: dict[str, int] = {}
        paces: dict[str, list[tuple[float, float]]] = {}
        for id, kept in self.updates.items():
            if kept.rejected is not None:
                continue
            given[kept.device] = max(kept.version, given.get(kept.device, 0))
            pace_s = (kept.received_wall - self.work[id].granted_wall) / kept.steps
            paces.setdefault(kept.device, []).append((kept.received_wall, pace_s))
        newest = {device: sorted(of)[-KEPT_PACES:] for device, of in paces.items()}
        leases = []
        for id, w in self.work.items():
            if w.open:
                ago_s = max(0.0, wall - w.granted_wall)
                until, begun = now + max(0.0, w.expires_in_s - ago_s), now - ago_s
                lease = Lease(id, w.device, w.version, w.rank, until, w.carry_rank, w.steps)
                leases.append(dataclasses.replace(lease, granted_at=begun))
        return Restarted(
            version=len(self.ranks),
            rank=self.ranks[-1] if self.ranks else 0,
            leases=tuple(leases),
            buffer=tuple(
                Buffered(id, self.updates[id].device, self.updates[id].version, self.updates[id].examples)
                for _, id in sorted(unmerged)
            ),
            contributed=tuple(given.items()),
            taken_back=tuple(self.back),
            newest=tuple({w.device: id for id, w in self.work.items()}.items()),
            paces_s=tuple((device, tuple(p for _, p in of if p > 0)) for device, of in newest.items()),
        )


@dataclass
class Service:
    """One life of the coordinator, from a start to a kill. `saw` is told of all that the engine did."""

    policy: Policy
    most: int | None  # versions that a device may enter under privacy; 0: no privacy
    steps: int
    disk: Disk
    saw: Callable[[Event[Any], float, list[Said]], None]
    now: float = 0.0
    wall: float = 0.0
    asked: int = 0
    merge: Merge | Revert | None = None  # under way
    outcome: Merged | MergeFailed | None = None  # of it, on disk, of which the engine has not heard
    expired: list[str] = field(default_factory=list)
    asking: set[str] = field(default_factory=set)  # devices whose grant is being written
    untold: set[str] = field(default_factory=set)  # updates on disk of which the engine has not heard

    def __post_init__(self) -> None:
        ration = None
        if self.most != 0:
            ration = Ration(self.most)
            self._leave_out_unpaid()
            for device in {u.device for u in self.disk.updates.values()}:
                ration.spend([device] * self.disk.entered(device))
        self.engine = Engine(self.policy, ration=ration, steps=self.steps)
        for effect in self.apply(self.disk.recalled(self.now, self.wall)):
            assert isinstance(effect, Decline)
            self.disk.reject(effect.update, _reason(effect))

    def _leave_out_unpaid(self) -> None:
        """As ledger.py does before the engine is told."""
        places = {d: self.disk.entered(d) for d in {u.device for u in self.disk.updates.values()}}
        for kept in sorted(self.disk.updates.values(), key=lambda kept: kept.received_wall):
            if kept.merged is None and kept.rejected is None and self.most is not None:
                places[kept.device] += 1
                if places[kept.device] > self.most:
                    kept.rejected = "its device had no privacy budget left"

    def apply(self, event: Event[Any]) -> list[Said]:
        effects = said(self.engine, event, self.now)
        self.saw(event, self.now, effects)
        for effect in effects:
            if isinstance(effect, Merge | Revert):
                assert self.merge is None
                self.merge = effect
            if isinstance(effect, Expired):
                self.expired.append(effect.lease.assignment)
        return effects

    # --- requests ---

    def ask(self, device: str, rank: int, carry_rank: int, id: str) -> Job:
        while device in self.asking:
            yield
        answer = self.apply(Asked(device, rank, id, carry_rank))[-1]
        if isinstance(answer, Wait):
            return ("wait", device, answer.retry_after_s)
        assert isinstance(answer, Grant)
        lease = answer.lease
        id, steps = lease.assignment, lease.steps
        if id not in self.disk.work:
            left_s = lease.expires_at - self.now
            row = Work(device, lease.version, lease.rank, lease.carry_rank, steps, left_s, self.wall)
            self.asking.add(device)
            yield
            self.disk.add_work(id, row)
            yield
            self.asking.discard(device)
        return ("work", device, id)

    def beat(self, device: str, id: str, steps_done: int) -> Job:
        yield from ()
        effects = self.apply(Beat(device, id, self.disk.work[id].version, steps_done))
        return ("told", device, id, effects[-1])

    def bytes_arrived(self, device: str, id: str, size_bytes: int) -> Job:
        yield from ()
        assert self.apply(BytesArrived(device, id, size_bytes)) == []
        return ("more",)

    def deliver(self, device: str, id: str, steps: int, examples: int, is_good: bool) -> Job:
        work = self.disk.work[id]
        if id in self.disk.updates:
            return (yield from self._known(id))
        if _declined(self.apply(Offered(device, id, work.version))):
            return ("stale", id)
        yield
        if not is_good:
            work.open = False
            yield
            self.apply(Refused(device, id))
            return ("refused", id)
        kept = Kept(device, work.version, examples, steps, self.wall)
        added = self.disk.add_update(id, kept)
        if isinstance(added, str):
            return ("stale", id)
        if not added:
            return (yield from self._known(id))
        self.untold.add(id)
        yield
        reason = _declined(self.apply(Stored(Buffered(id, device, work.version, examples), steps)))
        if reason:
            yield
            self.disk.reject(id, reason)
        self.untold.discard(id)
        return ("stale", id) if reason else ("acknowledged", id)

    def _known(self, id: str) -> Job:
        """It was stored before; whether it counts is known when the engine has heard of it."""
        while id in self.untold:
            yield
        return ("stale", id) if self.disk.updates[id].rejected is not None else ("acknowledged", id)

    # --- by itself ---

    def tick(self) -> None:
        self.apply(Tick())

    def note_expired(self) -> None:
        """What comes after a tick, unless it is killed first."""
        for id in self.expired:
            if id in self.disk.work:
                self.disk.work[id].open = False
        self.expired.clear()

    def revert(self, to: int) -> None:
        """The host wants to go back."""
        self.apply(RevertWanted(to))

    def bar(self, device: str) -> None:
        """The host bars a device, and lets it back at once."""
        self.disk.bar(device)
        for effect in self.apply(Barred(device)):
            assert isinstance(effect, Expired) or self.disk.updates[effect.update].rejected

    def end_merge(self, bad: int | None, rank: int) -> None:
        """On disk. bad: 0: all are good; i: the i-th is damaged; None: our own disk is full."""
        assert self.merge is not None
        taken = [u.update for u, _, _ in self.merge.weights] if isinstance(self.merge, Merge) else []
        barred = tuple(id for id in taken if self.disk.updates[id].rejected is not None)
        if bad is None:
            self.outcome = MergeFailed()
        elif isinstance(self.merge, Revert):
            self.disk.publish_revert(self.merge)
            self.outcome = Merged(self.merge.version, self.disk.ranks[-1], self.merge.to)
        elif barred:
            self.outcome = MergeFailed(barred)
        elif bad:
            update = self.merge.weights[(bad - 1) % len(self.merge.weights)][0]
            self.disk.reject(update.update, "damaged")
            self.outcome = MergeFailed((update.update,))
        else:
            self.disk.publish(self.merge, rank)
            self.outcome = Merged(self.merge.version, rank)

    def tell_outcome(self) -> None:
        assert self.outcome is not None
        outcome, self.outcome, self.merge = self.outcome, None, None
        for effect in self.apply(outcome):
            if isinstance(effect, Decline):
                self.disk.reject(effect.update, _reason(effect))


def _reason(declined: Decline) -> str:
    return "taken back" if "the host took back" in str(declined.error) else str(declined.error)


def _declined(effects: list[Said]) -> str:
    """Why, or nothing."""
    return "".join(str(effect.error) for effect in effects if isinstance(effect, Decline))
