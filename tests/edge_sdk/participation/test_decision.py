"""Which ranks a device may choose from, and how much memory it may take; and what a host may offer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.settings import load_settings
from edge_sdk.connection.link_speed import LinkSpeed
from edge_sdk.core.choice.setting import Ranks
from edge_sdk.core.errors import InputError
from edge_sdk.core.messages import Federation
from edge_sdk.core.profile import load_profile
from edge_sdk.model import base_model
from edge_sdk.options import Options
from edge_sdk.participation import decision
from edge_sdk.participation.decision import Known

PI = load_profile("raspberry-pi-5-8gb")


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    path = tmp_path / "federation.toml"
    path.write_text(
        '[federation]\nrule = "flexlora"\nladder = [2, 8, 32]\nmixed_ranks = [[3, 20], [32, 1]]\n'
        "[policy]\nlease_s = 100.0\n"
    )
    return load_settings(path).build("f-1")


# --- the host's side ------------------------------------------------------------------------------


def test_a_federation_carries_its_unequal_ranks_and_its_lease(federation: Federation) -> None:
    assert federation.mixed_ranks == ((3, 20), (32, 1))
    assert federation.lease_s == 100.0


@pytest.mark.parametrize("pair", [[0, 8], [8, 0], [8, 33], [33, 8], [-1, 4]])
def test_unequal_ranks_stay_within_the_ladder(tmp_path: Path, pair: list[int]) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(f"[federation]\nladder = [2, 32]\nmixed_ranks = [[2, 8], {pair}]\n")
    with pytest.raises(InputError) as caught:
        load_settings(path)
    assert str(caught.value) == (
        f"{path}: federation.mixed_ranks has {pair}; ranks (attention, feed-forward) lie between 1 and the "
        "ladder's 32"
    )


@pytest.mark.parametrize("value", ["[8]", "[[8]]", "[[8, 8, 8]]", '[["a", 8]]', "8"])
def test_unequal_ranks_are_pairs(tmp_path: Path, value: str) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(f"[federation]\nmixed_ranks = {value}\n")
    with pytest.raises(InputError, match=r"federation\.toml: key federation\.mixed_ranks"):
        load_settings(path)


# --- the device's side ----------------------------------------------------------------------------


def test_a_device_chooses_from_all_that_is_offered_or_takes_its_wish(federation: Federation) -> None:
    offered = [Ranks.uniform(2), Ranks.uniform(8), Ranks.uniform(32), Ranks(3, 20), Ranks(32, 1)]
    assert decision.ladder_of(federation, Options()) == offered
    for wish in (Ranks.uniform(5), Ranks(30, 2), Ranks.uniform(32)):
        assert decision.ladder_of(federation, Options(ranks=wish)) == [wish]


@pytest.mark.parametrize("wish", [Ranks.uniform(33), Ranks(attention=2, mlp=200)])
def test_a_wish_above_the_ladder_is_named(federation: Federation, wish: Ranks) -> None:
    with pytest.raises(InputError) as caught:
        decision.ladder_of(federation, Options(ranks=wish))
    assert str(caught.value) == f"rank {wish} is above the federation's ladder, which ends at 32"


def test_a_budget_is_the_owners_word_or_half_of_what_is_free() -> None:
    assert decision.budget_bytes(Options(profile=PI, memory_budget_bytes=5)) == 5
    total = PI.trainable_memory_total_bytes()
    assert decision.budget_bytes(Options(profile=PI, memory_budget_bytes=total)) == total
    assert decision.budget_bytes(Options(profile=PI)) == PI.trainable_memory_bytes() // 2


def test_a_budget_larger_than_the_machine_is_named() -> None:
    with pytest.raises(InputError) as caught:
        decision.budget_bytes(Options(profile=PI, memory_budget_bytes=64_000_000_000))
    assert str(caught.value) == f"memory budget 64 GB is more than {PI.name} has: 8.6 GB"


def test_what_is_known_of_the_device_enters_its_choice(federation: Federation) -> None:
    options = Options(device="cpu", profile=PI, memory_budget_bytes=2_000_000_000, quantise=False)

    def rank(known: Known, **changes: int) -> int:
        return decision.choose_rank(federation, replace(options, **changes), False, known).rank  # type: ignore[arg-type]

    facts = decision.facts_of(federation, options)
    assert rank(Known()) == 32
    chosen = decision.choose_rank(federation, options, False, Known())
    peak = chosen.chosen.peak_bytes
    assert decision.predicted_bytes(federation, options, False, chosen.setting) == peak
    assert rank(Known(), memory_budget_bytes=peak) == 32
    assert (
        decision.choose_rank(federation, options, False, Known(framework_bytes=7)).chosen.peak_bytes
        == peak + 7
    )
    corrected = decision.choose_rank(federation, options, False, Known(correction=1.5))
    assert corrected.chosen.peak_bytes == round(1.5 * peak)
    assert decision.choose_rank(federation, options, False, Known(longest=20)).setting.sequence_len == 20
    # Rank 32 takes twice the lease to send, rank 8 half of it.
    sent = chosen.chosen.upload_bytes
    slow = LinkSpeed(uploads=(sent / 200.0,))
    limited = decision.choose_rank(federation, options, False, Known(link=slow))
    assert limited.setting.ranks == max(
        (c.setting.ranks for c in limited.candidates if 2 * c.upload_bytes <= sent),
        key=facts.adapter_values,
    )
    assert limited.candidates[0].why_not == "needs 200 s of 100 s, most of it for its transfers"


def test_what_is_settled_to_be_carried_is_carried(federation: Federation) -> None:
    carry = replace(federation, rule="carry", holds_global=True)
    options = Options(device="cpu", profile=PI, memory_budget_bytes=2_000_000_000, quantise=False)
    assert decision.decide(carry, options).choice.setting.carry_rank == carry.rank_cap
    settled = decision.decide(carry, options, Known(), [Ranks.uniform(2)], 7).choice
    assert (settled.setting.carry_rank, settled.rank) == (7, 2)
    assert decision.decide(federation, options).choice.setting.carry_rank == 0
    assert not decision.decide(carry, options).quantise
    assert base_model.placement("cpu", False).weight_bytes == base_model.placement("cpu").compute_bytes
