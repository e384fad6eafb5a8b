"""The noise is Gaussian, and never the same twice. Bounds hold but for one run in a thousand million."""

from __future__ import annotations

import math

import numpy as np
import pytest

from coordinator.privacy import gaussian_noise
from coordinator.privacy.gaussian_noise import system_normals

COUNT = 200_000
SIGMAS = 6.2  # a Gaussian is further out with probability 6e-10


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_so_many_as_asked_for(count: int) -> None:
    assert system_normals(count).shape == (count,)


def test_moments() -> None:
    """Mean, variance, third and fourth moment, each within its own standard error times 6.2."""
    drawn = system_normals(COUNT)
    errors = {1: 1.0, 2: 2.0, 3: 15.0, 4: 96.0}  # variances of x, x², x³, x⁴
    for power, variance in errors.items():
        expected = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0}[power]
        assert abs(np.mean(drawn**power) - expected) <= SIGMAS * math.sqrt(variance / COUNT)


def test_distribution() -> None:
    """The largest distance from Φ anywhere: Dvoretzky, Kiefer, Wolfowitz and Massart, at 1e-9."""
    drawn = np.sort(system_normals(COUNT))
    normal = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in drawn])
    steps = np.arange(COUNT) / COUNT
    distance = max(np.abs(normal - steps).max(), np.abs(normal - steps - 1 / COUNT).max())
    assert distance <= math.sqrt(math.log(2 / 1e-9) / (2 * COUNT))


def test_the_two_of_a_pair_are_independent() -> None:
    drawn = system_normals(COUNT).reshape(2, -1)
    for f in (np.asarray, np.abs, np.square):
        one, two = f(drawn[0]), f(drawn[1])
        assert abs(np.corrcoef(one, two)[0, 1]) <= SIGMAS / math.sqrt(COUNT / 2)


def test_the_ends_of_the_generator_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_noise.os, "urandom", bytes)
    smallest = system_normals(2)
    np.testing.assert_allclose(smallest, [math.sqrt(2 * 65 * math.log(2)), 0.0], rtol=1e-12)  # 9.5 σ
    monkeypatch.setattr(gaussian_noise.os, "urandom", lambda count: b"\xff" * count)
    np.testing.assert_array_equal(np.abs(system_normals(2)), [0.0, 0.0])


def test_numpys_seed_does_not_repeat_it() -> None:
    draws = []
    for _ in range(2):
        np.random.seed(1)
        draws.append(system_normals(8))
    assert not np.intersect1d(*draws).size
