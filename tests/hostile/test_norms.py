"""Members whose updates are nothing, endless, or made to cancel: versions stay near what the honest made."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from coordinator.rules.named import rule_named
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.adapter_file.dtypes import WIRE_DTYPES
from edge_sdk.core.lora import Adapter, LoraFactors, Matrix
from edge_sdk.core.messages import Assignment
from edge_sdk.core.ranges import MOST
from edge_sdk.core.records import decode, to_json
from tests.coordinator.devices import LADDER, SCALING, SHAPES, configuration, update_of
from tests.faults.outside import Seen
from tests.hostile.harness import GoodDevice
from tests.processes import PATIENCE_S, CoordinatorProcess

RANK, HONEST, VERSIONS = 4, 7, 3
EXAMPLES = 160  # of an assignment: steps × batch
STEP = 0.008  # how far values of B move in an assignment: a tenth of what rate × steps can reach
Attack = Callable[[Mapping[str, LoraFactors]], dict[str, LoraFactors]]


# --- what is handed in ---


def drawn(name: str, seed: int, *shape: int) -> Matrix:
    return np.random.default_rng([seed, *name.encode()]).standard_normal(shape).astype(np.float32)


def trained(start: Adapter, seed: int, common: float = 1.0) -> dict[str, LoraFactors]:
    """What an honest device makes of `start`: a way that all have in common, and noise of its own."""
    made = {}
    for name, factors in start.items():
        shape = factors.b.shape
        way = np.float32(common) * drawn(name, 0, *shape) + drawn(name, seed, *shape)
        made[name] = LoraFactors(factors.b + np.float32(STEP) * way, factors.a)
    return made


def scaled(change: Adapter, of_b: float, of_a: float = 1.0) -> dict[str, LoraFactors]:
    return {name: LoraFactors(f.b * np.float32(of_b), f.a * np.float32(of_a)) for name, f in change.items()}


def cancelling(start: Adapter) -> dict[str, LoraFactors]:
    """Two columns of B at 10³¹ whose product with A is nothing."""
    made = {}
    for name, factors in trained(start, 1).items():
        b, a = factors.b.copy(), factors.a.copy()
        b[:, 0], b[:, 1], a[1] = 1e31, -1e31, a[0]
        made[name] = LoraFactors(b, a)
    return made


ATTACKS: dict[str, Attack] = {
    "zeros": lambda start: scaled(trained(start, 1), 0.0, 0.0),
    "tiny": lambda start: scaled(trained(start, 2), 1e-12),
    "a hundred thousand times": lambda start: scaled(trained(start, 3, common=0.0), 1e5),
    "columns that cancel": cancelling,
    "a large B beside a small A": lambda start: scaled(trained(start, 4, common=0.0), 1e9, 1e-9),
}


OF_FACTORS = ("a hundred thousand times", "a large B beside a small A")
"""What is refused where the factors themselves are averaged; sums of products clip the first."""


def nothing_yet() -> dict[str, LoraFactors]:
    """What a device begins with where it trains fresh factors on top of a frozen adapter."""
    ranks = {name: min(RANK, *shape) for name, shape in SHAPES.items()}
    return {
        name: LoraFactors(np.zeros((out, ranks[name]), np.float32), drawn(name, 7, ranks[name], in_) / 4.0)
        for name, (out, in_) in SHAPES.items()
    }


def product(adapter: Adapter) -> Matrix:
    return np.concatenate([adapter[name].product().ravel() for name in sorted(adapter)])


# --- a federation ---


class Member(GoodDevice):
    """It begins with what is served, or anew, as the rule says."""

    def begin(self, carries: bool) -> tuple[Assignment, dict[str, LoraFactors]] | None:
        """Work and what it starts from; None where it has to pause, as after a refusal."""
        answer = self.ask(RANK)
        if answer.status_code != 200:
            return None
        work = decode(Assignment, answer.content)
        return work, nothing_yet() if carries else self.served(work.version)

    def served(self, version: int, rank: int = RANK, dtype: str = "float32") -> dict[str, LoraFactors]:
        """A version as it is downloaded."""
        answer = self.http.get(f"/v1/versions/{version}/ranks/{rank}/{dtype}/adapter.safetensors")
        assert answer.status_code == 200, answer.text
        with tempfile.NamedTemporaryFile() as file:
            file.write(answer.content)
            file.flush()
            return dict(codec.open_own(Path(file.name), SCALING).modules())

    def give(self, work: Assignment, adapter: Adapter, *examples: int) -> list[int]:
        """Upload it, and announce it with each of these numbers in turn; the statuses of the answers."""
        content = codec.encode(adapter, SCALING)
        assert self.patch(work.id, content).status_code == 204
        record, route = to_json(update_of(content, RANK)), f"/v1/assignments/{work.id}/update"
        return [self.http.post(route, json=record | {"examples": count}).status_code for count in examples]


def configured(folder: Path, rule: str) -> str:
    size = HONEST + len(ATTACKS)
    policy = {"buffer_size": size, "quorum": HONEST, "timeout_s": 2.0, "least_version_s": 0.0}
    config = configuration(folder, policy, rule, reach_factor=1.0)
    return config.replace(f"ladder = {LADDER}", f"ladder = {ladder_of(rule)}")


def ladder_of(rule: str) -> list[int]:
    return [RANK] if rule == "fedit" else LADDER


@contextlib.contextmanager
def federation(folder: Path, rule: str) -> Iterator[tuple[list[Member], dict[str, Member]]]:
    """Honest members, and one for each attack. At the end all that was acknowledged is there."""
    with CoordinatorProcess(folder, configured(folder, rule)) as coordinator, contextlib.ExitStack() as stack:

        def member(name: str) -> Member:
            made = Member(coordinator.url, coordinator.join_token, name)
            return stack.enter_context(contextlib.closing(made))

        yield (
            [member(f"honest {number}") for number in range(HONEST)],
            {name: member(name) for name in ATTACKS},
        )
        assert coordinator.stop() == 0
        assert "Traceback" not in coordinator.log.read_text()
        Seen().check(coordinator.data, [])


def wait_for(member: Member, version: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while member.http.get("/v1/newest").json()["version"] < version:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def all_that_is_served_is_finite(member: Member, version: int, ladder: Iterable[int]) -> None:
    for rank, dtype in itertools.product(ladder, WIRE_DTYPES):
        assert np.isfinite(product(member.served(version, rank, dtype))).all(), (version, rank, dtype)


def hand_in_honestly(member: Member, carries: bool, version: int, number: int) -> Matrix:
    """What an honest member changed."""
    begun = member.begin(carries)
    assert begun is not None
    work, start = begun
    ended = trained(start, 100 * version + number)
    assert member.give(work, ended, EXAMPLES) == [202]
    changed: Matrix = product(ended) - (product(start) if work.version else 0.0)
    return changed


def hand_in_attack(member: Member, carries: bool, attack: Attack) -> int | None:
    """The answer to it; None where the member has to pause after a refusal."""
    begun = member.begin(carries)
    if begun is None:
        return None
    work, start = begun
    impossible, boast = member.give(work, attack(start), 10**18, MOST)
    assert impossible == 400
    return boast


@pytest.mark.parametrize("rule", ["carry", "flexlora", "fedit", "hetlora"])
def test_updates_that_are_nothing_endless_or_cancel(tmp_path: Path, rule: str) -> None:
    """Seven are honest and five are not: each version moves as the honest would have it, and not far."""
    carries, by_products = rule_named(rule).carries, rule_named(rule).sums_products
    with federation(tmp_path, rule) as (honest, hostile):
        before = np.zeros_like(product(nothing_yet()))
        for version in range(1, VERSIONS + 1):
            for name, member in hostile.items():
                answer = hand_in_attack(member, carries, ATTACKS[name])
                refused = name == "columns that cancel" or (not by_products and name in OF_FACTORS)
                assert answer in (None, 422) if refused else answer == 202, name
            changes = [hand_in_honestly(one, carries, version, n) for n, one in enumerate(honest)]
            wait_for(honest[0], version)
            all_that_is_served_is_finite(honest[0], version, ladder_of(rule))
            after = product(honest[0].served(version, max(ladder_of(rule))))
            wanted, found = np.mean(changes, axis=0), after - before
            size, before = float(np.linalg.norm(wanted)), after
            along = float(wanted @ found) / size
            # Measured: 0.30 to 1.16 of the way, up to 1.98 in all, at a cosine of 0.58 at least.
            assert 0.15 * size < along < 2.0 * size
            assert 0.3 * np.linalg.norm(found) < along
