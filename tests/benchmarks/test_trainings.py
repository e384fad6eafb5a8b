"""The benchmarks that train the embedded base: what must hold of each, on very short federations."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.carry import training as carry
from benchmarks.poisoning import training as poisoning
from benchmarks.poisoning.toy import Case
from benchmarks.privacy import training as privacy
from benchmarks.wire import dtypes as wire


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (carry, poisoning, privacy):
        monkeypatch.setattr(module, "TRAINING", replace(module.TRAINING, steps=2))
        monkeypatch.setattr(module, "TEST_PER_INTENT", 1)
        monkeypatch.setattr(module, "BUFFER_SIZE", 2)
    monkeypatch.setattr(poisoning, "HONEST_VERSIONS", 1)


def test_a_road_of_float32_changes_no_bit_and_int8_changes_some(tmp_path: Path) -> None:
    federation = carry.Federation()
    choice = carry.Choice("carry", 4, 32, "int8", steps=2)
    straight = federation.run([choice] * carry.HOUSEHOLDS, seed=0, last=3, every=1)
    plain, rounded = (
        wire.federate(federation, tmp_path, choice, wire.Wire(dtype, dtype, dtype), seed=0, last=3)
        for dtype in ("float32", "int8")
    )
    assert plain.losses == straight.losses
    assert plain.downloaded_loss == plain.losses["3"]
    assert rounded.losses != straight.losses
    assert rounded.upload_bytes < 0.4 * plain.upload_bytes


def test_all_attacks_share_what_was_before_them(tmp_path: Path) -> None:
    federation = poisoning.Federation(tmp_path)
    none, absent, reversed_ = (
        federation.run(Case("carry", attack, "none"), seed=0, last=2)
        for attack in ("nobody", "absent", "reversed")
    )
    assert none["1"] == absent["1"] == reversed_["1"]
    assert reversed_["2"] > none["2"]
    assert none["2"] != absent["2"]
    assert federation.run(Case("carry", "nobody", "none"), seed=0, last=2) == none


def test_noise_is_added_where_it_is_asked_for_and_is_the_same_again() -> None:
    federation = privacy.Federation()
    plain, clipped = (federation.run(norm, 0.0, seed=0, last=1) for norm in (math.inf, 1.0))
    noised, again = (federation.run(1.0, 0.1, seed=0, last=1) for _ in range(2))
    assert plain.clipped_share == 0.0 < clipped.clipped_share
    assert plain.losses[-1] < clipped.losses[-1]
    assert noised.losses == again.losses != clipped.losses
    assert plain.most_entered == 1
