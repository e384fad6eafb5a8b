"""What a device learns again because it did not carry it: the factored correction against the dense one."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.rules.carry import relearnt
from coordinator.rules.named import rule_named
from coordinator.rules.rule import Change, Merging
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import ProtocolError
from edge_sdk.core.flexlora import combine, live_rank
from edge_sdk.core.lora import LoraFactors, Matrix
from edge_sdk.core.messages import Ask, Assignment
from tests.coordinator.devices import SCALING, SHAPES, configuration, member, random_adapter
from tests.edge_sdk.core.draws import dense, factors, seeds
from tests.processes import PATIENCE_S, CoordinatorProcess

OUT, IN, RANK = 9, 7, 5

carried = st.lists(st.integers(0, RANK), min_size=1, max_size=4)


def version(seed: int, rank: int = RANK, out: int = OUT, in_: int = IN) -> LoraFactors:
    """A global adapter as it is stored: canonical, of this live rank."""
    return combine([(1.0, factors(np.random.default_rng(seed), out, in_, rank))], rank).factors


def tail_of(start: LoraFactors, change: Matrix, carry_rank: int) -> Matrix:
    """The dense U_t U_tᵀ D V_t V_tᵀ, with U and V of a dense SVD of the version."""
    u, _, vt = np.linalg.svd(start.product().astype(np.float64))
    u_t, v_t = u[:, carry_rank : live_rank(start)], vt[carry_rank : live_rank(start)].T
    found: Matrix = u_t @ u_t.T @ change @ v_t @ v_t.T
    return found


def close(actual: Matrix, expected: Matrix, scale: Matrix) -> None:
    assert np.abs(actual - expected).max() <= 1e-5 * float(np.linalg.norm(scale, 2))


@given(seeds, st.integers(1, 6), st.integers(0, RANK))
def test_one_device_is_the_dense_projection(seed: int, rank: int, carry_rank: int) -> None:
    start, change = version(seed), factors(np.random.default_rng([seed, 1]), OUT, IN, rank)
    product = change.product().astype(np.float64)
    found = relearnt(start, [(1.0, carry_rank, change)]).product()
    close(found, tail_of(start, product, carry_rank), product)


@given(seeds, carried)
def test_devices_of_one_version_share_a_block_of_its_rank(seed: int, carry_ranks: list[int]) -> None:
    start, draw = version(seed), np.random.default_rng([seed, 1])
    updates = [(float(draw.uniform(0.1, 1)), c, factors(draw, OUT, IN, 3)) for c in carry_ranks]
    block = relearnt(start, updates)
    assert block.rank == start.rank
    expected = sum(w * tail_of(start, f.product().astype(np.float64), c) for w, c, f in updates)
    close(block.product(), np.asarray(expected), dense([(w, f) for w, _, f in updates]))


@given(seeds, st.integers(1, RANK))
def test_what_was_carried_in_full_is_not_corrected(seed: int, live: int) -> None:
    start = version(seed, live)
    block = relearnt(start, [(1.0, live, factors(np.random.default_rng([seed, 1]), OUT, IN, 3))])
    assert not block.product().any()


def test_dead_components_are_no_tail() -> None:
    """A stored component of σ = 0 has no direction: what lies along its leftover row is new knowledge."""
    start = LoraFactors(np.array([[2.0, 0.0], [0.0, 0.0]]), np.eye(2))
    change = LoraFactors(np.eye(2), np.eye(2))
    np.testing.assert_allclose(relearnt(start, [(1.0, 0, change)]).product(), [[1.0, 0.0], [0.0, 0.0]])


def test_numbers_by_hand() -> None:
    # G = diag(3, 2, 1). The change is 1 everywhere; one device carried one component, one none.
    start = LoraFactors(np.diag([3.0, 2.0, 1.0]), np.eye(3))
    change = LoraFactors(np.ones((3, 1)), np.ones((1, 3)))
    found = relearnt(start, [(0.5, 1, change), (0.25, 0, change)]).product()
    expected = [[0.25, 0.25, 0.25], [0.25, 0.75, 0.75], [0.25, 0.75, 0.75]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@given(seeds, carried, st.sampled_from([0.5, 1.0, 1.5]))
def test_a_merge_of_two_versions_is_the_dense_sum(seed: int, carry_ranks: list[int], eta: float) -> None:
    """G + η Σ w (D − U_t U_tᵀ D V_t V_tᵀ), where devices started from the current version or an older one."""
    draw = np.random.default_rng([seed, 1])
    starts = [version(seed), version(seed + 1, 3)]
    weight = 1 / len(carry_ranks)
    rows = [(int(draw.integers(2)), c, factors(draw, OUT, IN, 2)) for c in carry_ranks]
    updates = [Change(weight, f, 2 - at, c) for at, c, f in rows]
    begun = {2: starts[0], 1: starts[1]}
    merging = Merging(starts[0], updates, 2, begun, eta)
    found = rule_named("carry").next(merging, min(OUT, IN)).factors.product()
    expected = starts[0].product().astype(np.float64)
    for at, c, f in rows:
        change = f.product().astype(np.float64)
        expected += eta * weight * (change - tail_of(starts[at], change, c))
    close(found, expected, np.abs(expected) + np.abs(dense([(weight, f) for _, _, f in rows])))


def test_without_the_correction_the_tail_counts_twice() -> None:
    """A device that carries nothing and learns the whole truth again must leave it as it is."""
    truth = version(3)
    change = Change(1.0, LoraFactors(truth.b, truth.a), 1, 0)
    naive = rule_named("carry").next(Merging(truth, [change], 1), RANK).factors.product()
    close(naive, 2 * truth.product(), truth.product())
    mended = rule_named("carry").next(Merging(truth, [change], 1, {1: truth}), RANK).factors.product()
    close(mended, truth.product(), truth.product())


# --- through the service --------------------------------------------------------------------------


def stored(folder: Path, number: int) -> dict[str, LoraFactors]:
    """A published version as the coordinator keeps it."""
    with sqlite3.connect(folder / "coordinator.sqlite") as database:
        ((digest,),) = database.execute("SELECT digest FROM versions WHERE version = ?", (number,))
    return dict(codec.open_own(folder / "blobs" / digest[:2] / digest, SCALING).modules())


def test_devices_of_unequal_carry_merge_to_the_dense_sum(tmp_path: Path) -> None:
    """Three devices over HTTP: one carries all, one a part, one nothing; the coordinator restarts between."""
    policy: dict[str, object] = {"buffer_size": 3, "staleness": "constant"}
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path, policy)) as coordinator,
        member(coordinator, "all") as all_,
        member(coordinator, "part") as part,
        member(coordinator, "none") as none,
    ):
        devices = ((all_, 99), (part, 3), (none, 0))

        def round_of(seed: int) -> list[tuple[Assignment, dict[str, LoraFactors]]]:
            done = []
            for place, (device, most) in enumerate(devices):
                work = device.transport.ask(Ask(4, most))
                assert isinstance(work, Assignment)
                done.append((work, random_adapter(4, seed + place)))
            coordinator.kill()  # what was granted must outlive it
            coordinator.start()
            for (device, most), (work, adapter) in zip(devices, done, strict=True):
                again = device.transport.ask(Ask(4, most))
                assert isinstance(again, Assignment)
                assert (again.id, again.carry_rank) == (work.id, work.carry_rank)
                device.hand_in(work, codec.encode(adapter, SCALING))
            return done

        first = round_of(10)
        assert [work.carry_rank for work, _ in first] == [0, 0, 0]  # version 0 has nothing to carry
        deadline = time.monotonic() + PATIENCE_S
        while all_.status().version < 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        live = all_.status().version_ranks["1"]
        second = round_of(20)
        assert [work.carry_rank for work, _ in second] == [live, 3, 0]
        while all_.status().version < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert coordinator.stop() == 0
        log = coordinator.log.read_text()
        assert "Traceback" not in log, log
        before, after = stored(coordinator.data, 1), stored(coordinator.data, 2)
    for name in SHAPES:
        plain = dense([(1 / 3, adapter[name]) for _, adapter in first])
        close(before[name].product(), plain, plain)  # on version 0 nothing is corrected
        expected = before[name].product().astype(np.float64)
        for work, adapter in second:
            change = adapter[name].product().astype(np.float64)
            expected += (change - tail_of(before[name], change, work.carry_rank)) / 3
        u, s, vt = np.linalg.svd(expected)
        kept = min(after[name].rank, len(s))
        close(after[name].product(), (u[:, :kept] * s[:kept]) @ vt[:kept], expected)


def test_a_negative_carry_rank_is_refused(tmp_path: Path) -> None:
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path)) as coordinator,
        member(coordinator) as device,
        pytest.raises(ProtocolError, match="Ask.carry_rank: must be 0 to 65536, got -1"),
    ):
        device.transport.ask(Ask(4, -1))
