"""How far training gets: by hand, against Adam itself, and what the learnt bound does with time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.merging.admission import Admission
from coordinator.merging.norm_bound import DAY_S, NormBound, tiny
from coordinator.merging.reach import Sizes, fresh_sizes, reach, sizes
from coordinator.settings import load_settings
from coordinator.storage.rows import Version
from coordinator.storage.store import Store
from edge_sdk.core.flexlora import FRESH_ROWS
from edge_sdk.core.lora import LoraFactors
from tests.coordinator.devices import configuration
from tests.edge_sdk.core.draws import factors, seeds


def test_the_reach_by_hand() -> None:
    """One component, (4, 9), s = 2, 10 steps of 0.1: β = 2·1·√4 = 4 and α = 1·√9 = 3."""
    found = reach(Sizes(5.0, 7.0, 6.0, 8.0), (4, 9), 1, moved=1.0, scaling=2.0)
    assert found.change == 4.0 * 7.0 + 5.0 * 3.0 + 4.0 * 3.0
    assert (found.b, found.a) == (6.0 + 4.0, 8.0 + 3.0)


@given(seeds, st.integers(1, 5))
def test_no_move_of_every_value_by_so_much_gets_further(seed: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    begun = factors(rng, 9, 7, rank, 1.0)
    moved, scaling = 0.3, 2.0
    end = LoraFactors(
        begun.b + scaling * moved * rng.choice([-1.0, 1.0], begun.b.shape),
        begun.a + moved * rng.choice([-1.0, 1.0], begun.a.shape),
    )
    found = reach(sizes(begun), (9, 7), rank, moved, scaling)
    assert np.linalg.norm(end.product() - begun.product()) <= found.change * (1 + 1e-6)
    assert np.linalg.norm(end.b) <= found.b * (1 + 1e-6)
    assert np.linalg.norm(end.a) <= found.a * (1 + 1e-6)


@pytest.mark.parametrize(("rank", "width"), [(2, 576), (16, 576), (16, 64)])
def test_fresh_factors_are_of_the_size_that_is_said(rank: int, width: int) -> None:
    rng = np.random.default_rng(0)
    a = rng.uniform(-FRESH_ROWS, FRESH_ROWS, (rank, width)) / math.sqrt(width)
    said, found = fresh_sizes((8, width), rank), sizes(LoraFactors(np.zeros((8, rank)), a))
    assert found.spectral_a == pytest.approx(said.spectral_a, rel=0.15)
    assert found.frobenius_a == pytest.approx(said.frobenius_a, rel=0.15)
    assert found.spectral_b == said.spectral_b == 0.0


# --- the learnt bound and time ----


class Learning:
    """A store of norms, and a clock that is put."""

    def __init__(self, folder: Path) -> None:
        (folder / "config.toml").write_text(configuration(folder))
        self.federation = load_settings(folder / "config.toml").build("f")
        self.store = Store(folder / "coordinator.sqlite")
        self.now, self.published = 0.0, 0

    def bound(self) -> NormBound:
        return NormBound(self.federation, self.store, Admission(), clock=lambda: self.now)

    def tell(self, *norms: float) -> None:
        """The latest of so many devices."""
        self.store.latest_norms = lambda devices: list(norms)  # type: ignore[method-assign]

    def publish(self, bound: NormBound, value: float | None) -> None:
        self.published += 1
        row = Version(self.published, "cd" * 32, 4, 2.0, 0.5, 9.0, norm_bound=value)
        self.store.publish(row, [])
        bound.published(value)


@pytest.fixture
def learning(tmp_path: Path) -> Learning:
    return Learning(tmp_path)


def test_the_first_bound_is_what_the_devices_say_and_then_it_moves_slowly(learning: Learning) -> None:
    bound = learning.bound()
    learning.tell(1.0, 1.0, 1.0)
    assert bound.now() is None
    learning.tell(2.0, 2.0, 2.0, 2.0)
    assert bound.now() == 10.0
    learning.publish(bound, 10.0)
    learning.tell(200.0, 200.0, 200.0, 200.0)
    assert bound.now() == pytest.approx(10.0)
    learning.now = DAY_S / 2
    assert bound.now() == pytest.approx(10.0 * math.sqrt(10.0))
    learning.tell(2.4, 2.4, 2.4, 2.4)
    assert bound.now() == pytest.approx(12.0)  # within what half a day allows
    learning.tell(0.002, 0.002, 0.002, 0.002)
    assert bound.now() == pytest.approx(10.0)  # so little says nothing


def test_it_survives_a_restart_and_silence(learning: Learning) -> None:
    bound = learning.bound()
    learning.publish(bound, 10.0)
    learning.now = 40 * DAY_S
    again = learning.bound()  # time begins anew: a clock set forward moves nothing
    learning.tell(200.0, 200.0, 200.0, 200.0)
    assert again.now() == pytest.approx(10.0)
    learning.tell()
    assert again.now() == 10.0


def test_who_sends_less_than_a_tenth_of_a_step_does_not_count(learning: Learning) -> None:
    """Tiny norms of half of the devices would shrink honest work to nothing."""
    least = tiny(learning.federation, 0)
    assert 0 < least < 0.1
    learning.tell(*[0.9 * least] * 5, *[1.0] * 4)
    assert learning.bound().now() == 5.0
