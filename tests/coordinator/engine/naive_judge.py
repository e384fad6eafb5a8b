"""What the engine must do, said a second time and naively, in plain lists and dictionaries.

It shares no code with the engine. It is told of every event with the effects that the engine gave, and
predicts them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from coordinator.engine.events import (
    Accept,
    Asked,
    Barred,
    Beat,
    Buffered,
    BytesArrived,
    Decline,
    Event,
    Expired,
    Grant,
    Joined,
    Merge,
    Merged,
    MergeFailed,
    Offered,
    Published,
    Refused,
    Restarted,
    Revert,
    RevertWanted,
    Stored,
    Tell,
    Tick,
    Wait,
)
from coordinator.engine.policy import Policy
from tests.coordinator.engine.effects import Said

LEAST_BYTES_S = 1024.0
DISCOUNTS = {
    "constant": lambda tau: 1.0,
    "polynomial": lambda tau: 1 / math.sqrt(1 + tau),
    "hinge": lambda tau: 1.0 if tau <= 4 else 1 / (10 * (tau - 4) + 1),
}


@dataclass
class Held:
    """Work that was granted to a device last, if nothing ended it."""

    id: str
    version: int
    rank: int
    carry_rank: int
    steps: int
    until: float
    begun: float
    is_live: bool = True
    done: int = 0
    sent: bool = False


@dataclass
class InLine:
    """Who was told to wait for a slot, when it must be back, and whether it kept to that so far."""

    number: int
    back_by: float
    is_sure: bool = True


@dataclass
class Seen:
    """All about one device since the coordinator's start."""

    held: Held | None = None
    given: list[int] = field(default_factory=list)  # versions that updates of it are from, in the end
    undone: int = -1  # newest version from which an update of it was rejected
    newest: str | None = None  # granted last
    refusals: int = 0
    idles: int = 0  # leases in a row that came to nothing
    pause_until: float = -math.inf
    noted: tuple[float, float] | None = None  # what it takes for an assignment, and since when that is known
    paces: list[float] = field(default_factory=list)
    in_line: InLine | None = None


@dataclass
class Judge:
    """Predicts and checks. `most`: versions for each device under privacy; 0: no privacy, None: no limit."""

    policy: Policy
    most: int | None
    steps: int
    version: int = 0
    rank: int = 0
    merge: Merge | Revert | None = None
    back: list[tuple[int, int]] = field(default_factory=list)  # (to, version) of those that reverted
    pool: list[Buffered] = field(default_factory=list)
    pool_since: float | None = None
    merge_since: float | None = None
    fails: int = 0
    rest_until: float = -math.inf
    seen: dict[str, Seen] = field(default_factory=dict)
    published_at: float | None = None
    left_over: set[str] = field(default_factory=set)  # who has an update that a version did not take
    entered: dict[str, int] = field(default_factory=dict)
    published: list[tuple[str, ...]] = field(default_factory=list)  # never forgotten
    numbers: int = 0

    # --- questions ---

    def of(self, device: str) -> Seen:
        return self.seen.setdefault(device, Seen())

    @property
    def is_synchronous(self) -> bool:
        return self.policy.mode == "synchronous"

    @property
    def limit(self) -> int:
        """Versions that an update may be behind."""
        if self.is_synchronous:
            return 0
        if self.policy.max_staleness is not None:
            return self.policy.max_staleness
        return max(10, int(self.policy.lease_s / self.policy.timeout_s))

    def can_count(self, device: str, version: int) -> bool:
        if (self.is_synchronous and self.merge) or self.is_gone(version):
            return False
        return self.version - version <= self.limit and all(v < version for v in self.of(device).given)

    def is_gone(self, version: int) -> bool:
        """The host took it back."""
        return any(version in range(to + 1, upper) for to, upper in self.back)

    def taking(self) -> list[Buffered]:
        """What the merge that is under way is made of."""
        return [update for update, _, _ in self.merge.weights] if isinstance(self.merge, Merge) else []

    def is_replaced(self, device: str, assignment: str) -> bool:
        return self.of(device).newest not in (None, assignment)

    def is_new(self, device: str) -> bool:
        """Nothing of it ever came in."""
        return not self.of(device).given and self.of(device).undone < 0

    @property
    def first_s(self) -> float:
        return min(self.policy.first_lease_s, self.policy.lease_s)

    def least_s(self, now: float) -> float:
        """From one version to the next."""
        if self.policy.least_version_s is not None:
            return self.policy.least_version_s
        notes = [seen.noted for seen in self.seen.values() if seen.noted]
        active = sorted(takes_s for takes_s, at in notes if at >= now - self.policy.lease_s)
        if self.is_synchronous or not active:
            return 0.0
        enough = next(takes_s for n, takes_s in enumerate(active, 1) if 4 * n >= 3 * len(active))
        return min(self.policy.timeout_s, enough / max(1, self.limit - 1))

    def notes(self, device: str, now: float) -> None:
        """What a device takes for the work that it holds."""
        seen, held = self.of(device), self.of(device).held
        assert held is not None
        so_far = now - held.begun
        if seen.paces:
            whole = median(seen.paces) * held.steps
        else:
            whole = so_far / held.done * held.steps if held.done else held.until - held.begun
        seen.noted = min(self.policy.lease_s, max(so_far, whole)), now

    def is_spent(self, device: str) -> bool:
        if not self.most:
            return False
        merging = self.taking()
        waiting = sum(update.device == device for update in [*self.pool, *merging])
        return self.entered.get(device, 0) + waiting >= self.most

    def live(self) -> dict[str, Held]:
        return {d: s.held for d, s in self.seen.items() if s.held and s.held.is_live}

    def in_round(self) -> set[str]:
        merging = self.taking()
        gave = {update.device for update in [*self.pool, *merging] if update.version == self.version}
        return gave | {device for device, held in self.live().items() if held.version == self.version}

    def ready(self) -> list[Buffered]:
        return [u for i, u in enumerate(self.pool) if all(u.device != o.device for o in self.pool[:i])]

    def is_overdue(self, now: float) -> bool:
        return (
            bool(self.pool) and self.pool_since is not None and now - self.pool_since >= self.policy.timeout_s
        )

    def is_due(self, now: float) -> bool:
        if self.merge or now < self.rest_until or not self.pool:
            return False
        if self.published_at is not None and now - self.published_at < self.least_s(now):
            return False
        count = len(self.ready())
        return count >= self.policy.buffer_size or (self.is_overdue(now) and count >= self.policy.quorum)

    # --- events ---

    def saw(self, event: Event[Any], now: float, effects: list[Said]) -> None:  # noqa: C901 one case an event
        """Check what was done about an event."""
        effects = list(effects)
        match event:
            case Restarted():
                self.restarted(event, now, effects)
            case Joined():
                assert effects == []
            case Asked():
                self.asked(event, now, effects)
            case Beat():
                self.beat(event, now, effects)
            case BytesArrived():
                held = self.of(event.device).held
                if held and held.id == event.assignment and held.is_live:
                    held.until = max(held.until, now + event.size_bytes / LEAST_BYTES_S)
                    held.sent = True
                assert effects == []
            case Tick():
                for device in sorted(self.live()):
                    held = self.live()[device]
                    if now >= held.until:
                        self.idles(device, now)
                        self.expires(device, effects)
                self.may_merge(now, effects)
            case Offered():
                self.offered(event, now, effects)
            case Stored():
                self.stored(event, now, effects)
            case Refused():
                self.refused(event, now, effects)
            case Barred():
                self.barred(event.device, effects)
            case Merged():
                self.merged(event, now, effects)
            case RevertWanted():
                if self.merge is None and now >= self.rest_until:
                    assert effects.pop(0) == Revert(self.version + 1, event.to)
                    self.merge, self.merge_since = Revert(self.version + 1, event.to), self.pool_since
                    self.rest_until = -math.inf
            case MergeFailed():
                self.merge_failed(event, now)
                assert effects == []
        assert effects == [], f"{event} had {effects} besides what it should have"

    def expires(self, device: str, effects: list[Said]) -> None:
        """The next effect says that the lease of a device is over."""
        held = self.of(device).held
        assert held is not None
        effect = effects.pop(0)
        assert isinstance(effect, Expired)
        assert (effect.lease.assignment, effect.lease.device) == (held.id, device)
        held.is_live = False

    def idles(self, device: str, now: float) -> None:
        """A lease ends. If nothing came of it, and that is nobody else's fault, its device pauses."""
        seen, held = self.of(device), self.of(device).held
        assert held is not None
        counts = self.can_count(device, held.version) and held.version >= seen.undone
        if not held.sent and (counts or held.done == 0):
            seen.idles += 1
            most_s = 3600.0 if counts else self.policy.lease_s
            pause_s = min(most_s, max(self.first_s, held.until - held.begun) * 2 ** (seen.idles - 1))
            seen.pause_until = max(seen.pause_until, now + pause_s)

    def restarted(self, event: Restarted, now: float, effects: list[Said]) -> None:
        assert event.version == self.version or event.version == self.version + 1
        if event.version > self.version:  # on disk, but the engine was never told
            assert self.merge is not None
            self.publish()
        self.rank, self.merge, self.pool, self.fails = event.rank, None, [], 0
        self.left_over = set()
        self.seen, self.rest_until, self.published_at = {}, -math.inf, None
        for device, version in event.contributed:
            self.of(device).given = [version]
        for device, paces in event.paces_s:
            self.of(device).paces = list(paces)
            if paces:
                steps, _ = self.share_of(device)
                self.of(device).noted = min(self.policy.lease_s, median(list(paces)) * steps), now
        for device, assignment in event.newest:
            self.of(device).newest = assignment
        for lease in event.leases:
            self.of(lease.device).held = Held(
                lease.assignment,
                lease.version,
                lease.rank,
                lease.carry_rank,
                lease.steps,
                lease.expires_at,
                lease.granted_at,
            )
            assert self.of(lease.device).newest == lease.assignment
            if self.is_new(lease.device):
                most = min(lease.granted_at + self.policy.lease_s, now + self.first_s)
                held = self.of(lease.device).held
                assert held is not None
                held.until = max(held.until, most)
            self.notes(lease.device, now)
        for update in event.buffer:
            if self.is_gone(update.version) or (self.is_synchronous and update.version < self.version):
                declined(effects.pop(0), update.update, self.version)
            else:
                self.pool.append(update)
        self.pool_since = now if self.pool else None

    def asked(self, event: Asked, now: float, effects: list[Said]) -> None:
        seen = self.of(event.device)
        held = seen.held
        if held and held.is_live:
            same = held.rank == event.rank and held.carry_rank <= event.carry_rank and now < held.until
            if same and self.can_count(event.device, held.version) and not self.is_spent(event.device):
                again = effects.pop(0)
                assert isinstance(again, Grant)
                assert (again.lease.assignment, again.lease.version) == (held.id, held.version)
                assert again.lease.expires_at == pytest.approx(held.until)
                return
            if now - held.begun >= self.first_s / 2 or seen.idles > 0:
                self.idles(event.device, now)
            else:
                seen.idles = 1
            self.expires(event.device, effects)
        seen.held = None
        answer = effects.pop(0)
        if isinstance(answer, Wait):
            assert self.obstacles(event.device, now) or self.must_line_up(event.device, now) is not False
            self.waits(event.device, answer, now)
            return
        assert isinstance(answer, Grant)
        assert not self.obstacles(event.device, now)
        assert self.must_line_up(event.device, now) is not True
        self.grants(event, answer, now)

    def obstacles(self, device: str, now: float) -> list[str]:
        """Why a device must wait, whoever else waits."""
        seen, why = self.of(device), []
        if self.is_spent(device):
            why.append("budget")
        waits = any(update.device == device for update in self.pool)
        if waits and (self.most != 0 or device in self.left_over):
            why.append("own update")
        if any(version >= self.version for version in seen.given):
            why.append("version")
        if now < seen.pause_until:
            why.append("pause")
        if self.is_synchronous and (self.merge or len(self.in_round() - {device}) >= self.policy.round_size):
            why.append("round")
        if self.policy.concurrency is not None and len(self.live()) >= self.policy.concurrency:
            why.append("slots")
        return why

    def must_line_up(self, device: str, now: float) -> bool | None:
        """Whether places are kept for others in line; None where it is not certain who is there."""
        frees = []
        if self.policy.concurrency is not None:
            frees.append(self.policy.concurrency - len(self.live()))
        if self.is_synchronous:
            frees.append(self.policy.round_size - len(self.in_round() - {device}))
        if not frees:
            return False
        free = min(frees)
        mine = self.of(device).in_line
        others = [s.in_line for d, s in self.seen.items() if s.in_line and d != device]
        there = [other for other in others if now <= other.back_by]
        if len(there) < free:
            return False
        if mine and (not mine.is_sure or now > mine.back_by):
            return None
        before = [other for other in there if mine is None or other.number < mine.number]
        if len(before) < free and all(other.is_sure for other in there):
            return False
        return True if sum(other.is_sure for other in before) >= free else None

    def waits(self, device: str, answer: Wait, now: float) -> None:
        seen = self.of(device)
        assert 0 < answer.retry_after_s <= max(3600.0, 1.5 * max(300.0, self.policy.retry_s))
        assert answer.reason
        if "in line" not in answer.reason:
            seen.in_line = None
            return
        back_by = now + 1.5 * answer.retry_after_s + 10.0
        if seen.in_line and now <= seen.in_line.back_by:
            seen.in_line.back_by = back_by
            return
        self.numbers += 1
        seen.in_line = InLine(self.numbers, back_by, is_sure=seen.in_line is None)

    def grants(self, event: Asked, answer: Grant, now: float) -> None:
        seen, lease = self.of(event.device), answer.lease
        assert (lease.device, lease.assignment, lease.rank) == (event.device, event.assignment, event.rank)
        assert lease.version == self.version
        assert lease.carry_rank == min(event.carry_rank, self.rank)
        steps, until_s = self.share_of(event.device)
        assert lease.steps == steps
        assert lease.expires_at == pytest.approx(now + until_s)
        seen.in_line = None
        seen.held = Held(
            lease.assignment, lease.version, lease.rank, lease.carry_rank, steps, lease.expires_at, now
        )
        seen.newest = lease.assignment
        self.notes(event.device, now)
        assert self.policy.concurrency is None or len(self.live()) <= self.policy.concurrency
        assert not self.is_synchronous or len(self.in_round()) <= self.policy.round_size

    def share_of(self, device: str) -> tuple[int, float]:
        """Steps and seconds for a device, by how long it took for a step."""
        paces = self.of(device).paces
        if self.is_new(device) or len(paces) < 3:
            return self.steps, self.first_s if self.is_new(device) else self.policy.lease_s
        middle, steps = median(paces), self.steps
        if self.policy.work_s is not None:
            within = int(self.policy.work_s / max(middle, 1e-9))
            steps = max(1, steps // 8, min(steps, within))
        spread = max(median([abs(pace - middle) for pace in paces]), 0.1 * middle)
        usual_s = steps * (middle + self.policy.deadline_mads * spread)
        return steps, min(self.policy.lease_s, max(10.0, usual_s))

    def beat(self, event: Beat, now: float, effects: list[Said]) -> None:
        seen = self.of(event.device)
        held = seen.held if seen.held and seen.held.id == event.assignment else None
        told = effects.pop()
        assert isinstance(told, Tell)
        if self.is_replaced(event.device, event.assignment):
            assert told.directive == "abandon"
            return
        if not self.can_count(event.device, event.version):
            assert told.directive == "abandon"
            if held and held.is_live:
                self.expires(event.device, effects)
            seen.held = None if held else seen.held
            return
        if told.directive == "abandon":  # only where a later update of it was damaged
            assert event.version < seen.undone
            if held and held.is_live:
                self.expires(event.device, effects)
            seen.held = None if held else seen.held
            return
        is_new = self.is_new(event.device)
        late = held is not None and not held.is_live
        if held and late and is_new and now < held.begun + self.policy.lease_s:
            late = False  # a first lease is short
        last = self.limit > 0 and self.version - event.version == self.limit
        awaited = self.is_overdue(now) and not self.merge and now >= self.rest_until
        half = held is not None and 2 * event.steps_done >= held.steps
        if held and (late or last or (awaited and half and not self.rests)):
            assert told.directive == "finish"
        else:
            assert told.directive == "continue"
        if held:
            self.progress(event, held, now)

    def progress(self, event: Beat, held: Held, now: float) -> None:
        """What a heartbeat about the work in hand changes."""
        done = min(event.steps_done, held.steps)
        if done > held.done:
            held.done = done
            if held.is_live and self.is_new(event.device):
                rest_s = (now - held.begun) * (held.steps - done) / done
                most = held.begun + self.policy.lease_s
                held.until = max(held.until, min(most, now + rest_s + self.first_s))
        self.notes(event.device, now)

    @property
    def rests(self) -> bool:
        """Whether the last merge failed for our own reasons and no tick has come since the pause."""
        return self.rest_until > -math.inf

    def offered(self, event: Offered, now: float, effects: list[Said]) -> None:
        seen = self.of(event.device)
        held = seen.held if seen.held and seen.held.id == event.assignment else None
        answer = effects.pop()
        counts = self.can_count(event.device, event.version)
        if isinstance(answer, Accept):
            assert counts
            assert not self.is_spent(event.device)
            assert not self.is_replaced(event.device, event.assignment)
            return
        declined(answer, event.assignment, self.version)
        replaced = self.is_replaced(event.device, event.assignment)
        assert not counts or replaced or self.is_spent(event.device) or event.version < seen.undone
        if held and held.is_live and effects:
            self.expires(event.device, effects)
            assert seen.held is not None
        if held and not self.is_spent(event.device):
            seen.held = None

    def stored(self, event: Stored, now: float, effects: list[Said]) -> None:
        seen, update = self.of(event.device), event.update
        held = seen.held if seen.held and seen.held.id == event.assignment else None
        counts = self.can_count(event.device, update.version) and not self.is_spent(event.device)
        counts = counts and not self.is_replaced(event.device, event.assignment)
        answers = [effect for effect in effects if isinstance(effect, Decline)]
        if answers:
            assert not counts or update.version < seen.undone
            declined(answers[0], update.update, self.version)
            effects.remove(answers[0])
            if held and held.is_live and effects:
                self.expires(event.device, effects)
            if held and not self.is_spent(event.device):
                seen.held = None
        else:
            assert counts
            self.pool.append(update)
            self.pool_since = now if self.pool_since is None else self.pool_since
            seen.given.append(update.version)
            seen.refusals, seen.idles, seen.pause_until = 0, 0, -math.inf
            if held:
                seen.paces = [*seen.paces, (now - held.begun) / event.steps][-8:]
                seen.noted = min(self.policy.lease_s, median(seen.paces) * held.steps), now
            seen.held = None if held else seen.held
        self.may_merge(now, effects)

    def refused(self, event: Refused, now: float, effects: list[Said]) -> None:
        seen = self.of(event.device)
        if seen.held and seen.held.id == event.assignment:
            if seen.held.is_live:
                self.expires(event.device, effects)
            seen.held = None
        seen.refusals += 1
        pause_s = min(3600.0, self.policy.retry_s * 2 ** (seen.refusals - 1))
        seen.pause_until = max(seen.pause_until, now + pause_s)

    def barred(self, device: str, effects: list[Said]) -> None:
        """Nothing of it is left but what is being merged."""
        seen = self.of(device)
        if seen.held and seen.held.is_live:
            self.expires(device, effects)
        seen.held, seen.in_line, seen.noted = None, None, None
        for update in [update for update in self.pool if update.device == device]:
            declined(effects.pop(0), update.update, self.version)
            self.pool.remove(update)
            seen.given = [version for version in seen.given if version != update.version]
            seen.undone = max(seen.undone, update.version)
        self.left_over.discard(device)
        if not self.pool:
            self.pool_since = None

    # --- versions ---

    def may_merge(self, now: float, effects: list[Said]) -> None:
        """A merge begins now if it is due, and only then."""
        due = self.is_due(now)
        if self.merge is None and now >= self.rest_until:
            self.rest_until = -math.inf
        if not due:
            assert not any(isinstance(effect, Merge) for effect in effects)
            return
        merge = effects.pop(0)
        assert isinstance(merge, Merge)
        assert merge.version == self.version + 1
        taken = self.ready()
        owners = {update.device for update in taken}
        assert [update for update, _, _ in merge.weights] == taken
        assert not any(self.is_gone(update.version) for update in taken)
        taus = [self.version - update.version for update in taken]
        assert [tau for _, _, tau in merge.weights] == taus
        discount = [DISCOUNTS[self.policy.staleness](tau) for tau in taus]
        wanted: list[float] = [d / self.policy.buffer_size for d in discount]
        if self.most == 0:
            raw = [
                min(u.examples, self.policy.max_examples) * d for u, d in zip(taken, discount, strict=True)
            ]
            wanted = [weight / sum(raw) for weight in raw]
            assert sum(weight for _, weight, _ in merge.weights) == pytest.approx(1.0)
        assert [weight for _, weight, _ in merge.weights] == pytest.approx(wanted)
        self.merge, self.merge_since, self.pool_since = merge, self.pool_since, None
        self.pool = [update for update in self.pool if update not in taken]
        self.left_over -= owners
        self.left_over |= {update.device for update in self.pool if update.device in owners}

    def publish(self) -> None:
        assert self.merge is not None
        self.version += 1
        if isinstance(self.merge, Revert):
            self.back.append((self.merge.to, self.version))
            self.published.append(())
            return
        self.published.append(tuple(update.update for update, _, _ in self.merge.weights))
        for update, _, _ in self.merge.weights:
            self.entered[update.device] = self.entered.get(update.device, 0) + 1

    def merged(self, event: Merged, now: float, effects: list[Said]) -> None:
        self.publish()
        for update in [update for update in self.pool if self.is_gone(update.version)]:
            declined(effects.pop(0), update.update, self.version)
            self.pool.remove(update)
        assert effects.pop(0) == Published(self.version)
        assert event.version == self.version
        self.merge, self.rank, self.fails, self.published_at = None, event.rank, 0, now
        self.pool_since = now if self.pool else None
        for held in self.live().values():
            if self.version - held.version > self.limit or self.is_gone(held.version):
                held.until = min(held.until, now)
        self.may_merge(now, effects)

    def merge_failed(self, event: MergeFailed, now: float) -> None:
        assert self.merge is not None
        taken = self.taking()
        self.merge = None
        back = [update for update in taken if update.update not in event.rejected]
        self.pool = back + self.pool
        self.pool_since = self.merge_since if back else self.pool_since
        for update in taken:
            if update.update in event.rejected:
                seen = self.of(update.device)
                seen.given = [version for version in seen.given if version != update.version]
                seen.undone = max(seen.undone, update.version)
        self.fails = 0 if event.rejected else self.fails + 1
        self.rest_until = now + min(60.0, 2.0 ** (self.fails - 1)) if self.fails else -math.inf


def declined(effect: Any, update: str, version: int) -> None:
    """It says no, why, and where to go on."""
    assert isinstance(effect, Decline)
    assert effect.update == update
    assert len(str(effect.error)) > 20
    assert effect.error.details == {"current_version": version}


def median(values: list[float]) -> float:
    ordered, n = sorted(values), len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
