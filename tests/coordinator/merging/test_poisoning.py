"""A fifth of the devices send harmful updates: what that does, and what each robust rule keeps."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from benchmarks.poisoning.toy import Attack, Case, Defence, Known, federate, merged
from coordinator.merging.admission import Admission
from coordinator.merging.aggregation import aggregate
from coordinator.merging.robust import RobustName
from coordinator.merging.sources import Addend, StartVersion
from coordinator.merging.weighing import Robust, weighing
from coordinator.rules.named import rule_named, served
from coordinator.settings import load_settings
from coordinator.storage.blobs import Blobs
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.flexlora import combine
from edge_sdk.core.lora import Adapter, LoraFactors
from edge_sdk.core.messages import Federation
from tests.coordinator.devices import SCALING, SHAPES, configuration, random_adapter
from tests.edge_sdk.core.draws import dense

RULE_NAMES: tuple[str, ...] = ("carry", "innovation", "flexlora")
ROBUST: tuple[Defence, ...] = ("norm_median", "geometric_median", "trimmed")


@cache
def error(rule: str, attack: Attack, defence: Defence = "none") -> float:
    """Relative error of the global matrix; 1 is that of no training at all."""
    return federate(Case(rule, attack, defence), seed=0)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("attack", ["reversed", "scaled"])
def test_undefended_the_federation_is_worse_than_no_training(rule: str, attack: Attack) -> None:
    assert error(rule, "nobody") < 0.15
    assert error(rule, attack) > 10


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("attack", ["reversed", "scaled"])
@pytest.mark.parametrize("defence", ROBUST)
def test_defended_it_learns_nearly_as_well_as_without_the_hostile(
    rule: str, attack: Attack, defence: Defence
) -> None:
    assert error(rule, attack, defence) < 1.6 * error(rule, "absent")


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("attack", ["reversed", "scaled"])
def test_the_learnt_bound_keeps_the_harm_in_bounds(rule: str, attack: Attack) -> None:
    """Five times the median is still a long step in a wrong direction: it is no robust rule."""
    assert error(rule, attack, "bound") < 0.05 * error(rule, attack)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("defence", ROBUST)
def test_a_flipped_sign_alone_is_only_a_drag(rule: str, defence: Defence) -> None:
    """No norm shows it. Undefended it slows the federation down; defended it is no worse than that."""
    undefended = error(rule, "flipped")
    assert error(rule, "nobody") < undefended < 2 * error(rule, "absent")
    assert error(rule, "flipped", defence) < 1.3 * undefended


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("defence", ["bound", *ROBUST])
def test_where_nobody_is_hostile_a_defence_costs_little(rule: str, defence: Defence) -> None:
    assert error(rule, "nobody", defence) < 1.3 * error(rule, "nobody")


# --- the same on files ----------------------------------------------------------------------------


def federation(folder: Path, rule: str) -> Federation:
    config = folder / "config.toml"
    config.write_text(configuration(folder, rule=rule))
    return load_settings(config).build("f")


def version_one(folder: Path, made: Federation, blobs: Blobs) -> StartVersion:
    """A published version to train from."""
    path = blobs.path(blobs.write([codec.encode(random_adapter(4, 99), SCALING)]))
    outcome = aggregate(made, 1.0, StartVersion(0), [Addend("first", 1.0, path, 4)], blobs.write)
    return StartVersion(1, blobs.path(outcome.digest))


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("robust", ["norm_median", "geometric_median", "trimmed"])
def test_files_are_merged_by_robust_weights_over_all_modules(
    tmp_path: Path, rule: str, robust: RobustName
) -> None:
    """Against dense matrices: Gram of all modules together, weights from it, sums of changes or states."""
    made, blobs = federation(tmp_path, rule), Blobs(tmp_path)
    start = version_one(tmp_path, made, blobs)
    assert start.path is not None
    stored = dict(codec.open_own(start.path, SCALING).modules())
    carries = rule_named(rule).carries
    begun = {n: served(made, 1, n, f, min(4, *f.shape)) for n, f in stored.items()}
    sent = [random_adapter(4, seed) for seed in range(4)]
    sent.append({n: LoraFactors(f.b * np.float32(50.0), f.a) for n, f in random_adapter(4, 4).items()})
    addends = []
    for number, adapter in enumerate(sent):
        path = blobs.path(blobs.write([codec.encode(adapter, SCALING)]))
        from_ = StartVersion(1) if carries else start
        addends.append(Addend(f"u{number}", 0.2, path, 4, from_, 99, factor=0.5 if number == 3 else 1.0))
    outcome = aggregate(made, 1.0, start, addends, blobs.write, weighing(Admission(robust=robust), None))
    found = dict(codec.open_own(blobs.path(outcome.digest), SCALING).modules())

    changes = [
        {n: f.product().astype(np.float64) - (0.0 if carries else begun[n].product()) for n, f in a.items()}
        for a in sent
    ]
    changes[3] = {n: 0.5 * change for n, change in changes[3].items()}
    flat = np.array([np.concatenate([c.ravel() for c in change.values()]) for change in changes])
    lengths = np.linalg.norm(flat, axis=1)
    weights, factors = np.array(outcome.weights), np.ones(5)
    assert weights.sum() == pytest.approx(1.0)
    if robust == "norm_median":
        factors = np.minimum(1.0, np.sort(lengths)[2] / lengths)
        np.testing.assert_allclose(weights, 0.2)
    elif robust == "trimmed":
        np.testing.assert_allclose(weights, np.where(lengths == lengths.max(), 0.0, 0.25))
    else:
        assert weights[4] < 0.05 < weights[:4].min()
    for name, shape in SHAPES.items():
        old = stored[name].product().astype(np.float64)
        expected = np.sum(
            [w * f * c[name] for w, f, c in zip(weights, factors, changes, strict=True)], axis=0
        )
        expected += begun[name].product() if rule == "flexlora" else old
        u, s, vt = np.linalg.svd(expected, full_matrices=False)
        kept = min(made.rank_cap, *shape)
        np.testing.assert_allclose(
            found[name].product(), (u[:, :kept] * s[:kept]) @ vt[:kept], atol=2e-5 * lengths.max()
        )


def test_the_toy_merges_as_files_are_merged(tmp_path: Path) -> None:
    """So that what is measured in memory holds for the coordinator."""
    made = federation(tmp_path, "carry")
    blobs, (name, *others) = Blobs(tmp_path), SHAPES
    adapters: list[Adapter] = [random_adapter(4, seed) for seed in range(3)]
    still = {n: LoraFactors(np.zeros((SHAPES[n][0], 4)), np.zeros((4, SHAPES[n][1]))) for n in others}
    paths = [blobs.path(blobs.write([codec.encode({**a, **still}, SCALING)])) for a in adapters]
    addends = [Addend(f"u{k}", 1 / 3, path, 4, carry_rank=12) for k, path in enumerate(paths)]
    outcome = aggregate(
        made, 1.0, StartVersion(0), addends, blobs.write, Robust(Admission(robust="norm_median"))
    )
    found = codec.open_own(blobs.path(outcome.digest), SCALING).module(name)
    updates = [(k, adapter[name]) for k, adapter in enumerate(adapters)]
    toy = merged(
        Case("carry", "nobody", "norm_median"), 0, LoraFactors.empty(*SHAPES[name]), updates, Known()
    )
    np.testing.assert_allclose(found.product(), toy.product(), atol=1e-4)
    plain = combine([(1 / 3, f) for _, f in updates], 12).factors
    assert np.abs(plain.product() - dense([(1.0, toy)])).max() > 1e-3
