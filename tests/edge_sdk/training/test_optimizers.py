"""Recomputed activations, 8-bit moments, and unequal ranks: what training must give all the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from edge_sdk.core.choice.setting import Optimizer, Ranks
from edge_sdk.core.errors import InputError
from edge_sdk.core.lora import Adapter, LoraFactors
from edge_sdk.model import base_model
from edge_sdk.text.rows import Tokenised
from edge_sdk.training import optimizers
from edge_sdk.training.checkpoint import Checkpoint, read_checkpoint
from edge_sdk.training.plan import Interrupted, Plan, Start, StepAnswer, StepReport, Trained
from edge_sdk.training.recompute import recomputed
from edge_sdk.training.trainer import Trainer
from tests.models import ARCHITECTURES, Architecture, build_model

WIDE = Ranks.uniform(64)  # 64 × 64 values: the least that bitsandbytes keeps in 8 bits
ROWS = [
    Tokenised(ids=row, labels=row)
    for row in (tuple((11 * n + 3 * p) % 290 + 5 for p in range(12 + n)) for n in range(6))
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Architecture, Path]:
    return {name: build_model(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}


def make(directory: Path, **options: Any) -> Trainer:
    base = base_model.load(str(directory), device="cpu", **options)
    return Trainer(base, base_model.describe(str(directory)).modules, 2.0, progress=False)


@pytest.fixture(scope="module")
def it(directories: Mapping[Architecture, Path]) -> Trainer:
    return make(directories["llama"], quantise=False, dtype="float32")


def train(it: Trainer, start: Start, path: Path | None = None, stop_at: int = 0, **changes: Any) -> Trained:
    given: dict[str, Any] = {"batch": 3, "micro_batch": 2, "sequence_len": 64, "learning_rate": 5e-3}

    def on_step(report: StepReport) -> StepAnswer:
        return "interrupt" if report.step == stop_at else "continue"

    return it.train(start, ROWS, Plan(steps=6, **(given | changes)), on_step=on_step, checkpoint=path)


def same_bits(left: Adapter, right: Adapter) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(left[n].b, right[n].b) and np.array_equal(left[n].a, right[n].a) for n in left
    )


def read(path: Path) -> Checkpoint:
    kept = read_checkpoint(path, lambda _: True)
    assert kept is not None
    return kept


def carried(it: Trainer, rank: int) -> dict[str, LoraFactors]:
    draw = np.random.default_rng(0)
    found = {}
    for name, (out, in_) in it.shapes.items():
        r = min(rank, out, in_)
        b, a = draw.standard_normal((out, r)), draw.standard_normal((r, in_))
        found[name] = LoraFactors((0.05 * b).astype(np.float32), (0.05 * a).astype(np.float32))
    return found


# --- recomputation --------------------------------------------------------------------------------


@pytest.mark.parametrize("quantise", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputed_activations_give_the_same_bits(
    directories: Mapping[Architecture, Path], architecture: Architecture, quantise: bool
) -> None:
    it = make(directories[architecture], quantise=quantise)
    start = Start(None, carried(it, 5), 4, seed=1)
    plain, again = (train(it, start, checkpointing=on) for on in (False, True))
    assert same_bits(plain.adapter, again.adapter)
    assert (plain.loss_before, plain.loss_after) == (again.loss_before, again.loss_after)
    assert any(factors.b.any() for factors in again.adapter.values())


def test_every_block_is_computed_twice_and_only_within(it: Trainer) -> None:
    model = it.base.model
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    calls = []
    handles = [block.input_layernorm.register_forward_hook(lambda *_: calls.append(1)) for block in blocks]
    try:
        train(it, Start(None, None, 2, 1), checkpointing=True, batch=2, micro_batch=2)
        assert len(calls) == 6 * 2 * len(blocks)
        calls.clear()
        train(it, Start(None, None, 2, 1), batch=2, micro_batch=2)
        assert len(calls) == 6 * len(blocks)
    finally:
        for handle in handles:
            handle.remove()
    try:
        with recomputed(model, True):
            assert all("forward" in vars(block) for block in blocks)
            raise Interrupted
    except Interrupted:
        pass
    assert not any("forward" in vars(block) for block in blocks)


def test_a_model_without_blocks_says_so() -> None:
    plain = torch.nn.Linear(2, 2)
    with recomputed(plain, False):
        pass
    with (
        pytest.raises(InputError, match="Linear has no blocks that could be recomputed"),
        recomputed(plain, True),
    ):
        raise AssertionError


# --- 8-bit moments --------------------------------------------------------------------------------


def test_moments_in_8_bits_learn_and_are_small(it: Trainer, tmp_path: Path) -> None:
    path, start = tmp_path / "checkpoint", Start(None, None, WIDE, seed=1)
    plain = train(it, start)
    done = train(it, start, path, optimizer="adamw8bit", checkpoint_s=0.0)
    assert done.loss_after < done.loss_before == plain.loss_before
    assert not same_bits(done.adapter, plain.adapter)
    tensors = read(path).tensors
    large = [name for name in tensors if name.endswith((".a", ".b")) and tensors[name].size >= 4096]
    assert large
    for name in large:
        for part in ("state1", "state2"):
            assert tensors[f"{name}.{part}"].dtype == np.uint8
            assert tensors[f"{name}.{part}"].shape == tensors[name].shape
    small = next(name for name in tensors if name.endswith("k_proj.a"))  # (16, 64)
    assert tensors[f"{small}.state1"].dtype == np.float32


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_resumed_run_gives_the_same_bits(
    it: Trainer, tmp_path: Path, kind: Optimizer, stop_at: int
) -> None:
    path, start = tmp_path / "checkpoint", Start(None, None, WIDE, seed=1)
    whole = train(it, start, optimizer=kind)
    with pytest.raises(Interrupted):
        train(it, start, path, stop_at, optimizer=kind)
    resumed = train(it, start, path, optimizer=kind)
    assert same_bits(resumed.adapter, whole.adapter)
    assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)


@pytest.mark.parametrize("before", ["adamw", "adamw8bit"])
def test_a_run_goes_on_with_the_other_optimiser(it: Trainer, tmp_path: Path, before: Optimizer) -> None:
    """Factors and counters are kept; moments in another form are not, so that Adam warms up again."""
    after: Optimizer = "adamw8bit" if before == "adamw" else "adamw"
    path, start = tmp_path / "checkpoint", Start(None, None, WIDE, seed=1)
    with pytest.raises(Interrupted):
        train(it, start, path, 3, optimizer=before)
    kept = read(path)
    still = train(it, start, path, optimizer=after, learning_rate=5e-3)
    assert (still.steps, still.loss_before) == (6, kept.progress.loss_first)
    # The first step after the change begins at the factors that were kept.
    path.unlink()
    with pytest.raises(Interrupted):
        train(it, start, path, 3, optimizer=before)
    with pytest.raises(Interrupted):
        train(it, start, path, 4, optimizer=after)
    changed = read(path)
    assert changed.progress.adam_since == 3
    assert changed.progress.step == 4
    parts = {name.rsplit(".", 1)[1] for name in changed.tensors} - {"a", "b"}
    assert parts <= set(optimizers.MOMENTS[after])
    moved = max(
        float(np.abs(changed.tensors[n] - kept.tensors[n]).max()) for n in kept.tensors if n[-2:] == ".a"
    )
    assert 0 < moved <= 1.01 * 5e-3  # one step of Adam from there: at most the learning rate


def test_moments_go_out_and_in_without_loss() -> None:
    for kind in optimizers.MOMENTS:
        parameters = [torch.nn.Parameter(torch.linspace(-1, 1, size)) for size in (8, 8192)]
        first = optimizers.build(kind, parameters, 0.1)
        assert all(optimizers.moments(kind, first, p) == {} for p in parameters)  # before the first step
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.5)
        first.step()
        copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
        second = optimizers.build(kind, copies, 0.1)
        for parameter, copy in zip(parameters, copies, strict=True):
            views = optimizers.moments(kind, first, parameter)
            given = {name: array.copy() for name, array in views.items()}
            optimizers.restore(kind, second, copy, given, step=1)
            found = optimizers.moments(kind, second, copy)
            assert found.keys() == given.keys() != set()
            assert all(np.array_equal(found[name], given[name]) for name in given)
        for group in (parameters, copies):
            for parameter in group:
                parameter.grad = torch.full_like(parameter, -0.25)
        first.step()
        second.step()
        assert all(torch.equal(p, c) for p, c in zip(parameters, copies, strict=True)), kind


# --- unequal ranks --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["carry", "flexlora"])
def test_unequal_ranks_come_back_with_their_shapes(it: Trainer, rule: str) -> None:
    ranks = Ranks(attention=3, mlp=40)
    expected = {name: min(ranks.of(name), *shape) for name, shape in it.shapes.items()}
    given = {name: f.leading(expected[name]) for name, f in carried(it, 40).items()}
    start = Start(None, carried(it, 6), ranks, 1) if rule == "carry" else Start(given, None, ranks, 1)
    done = train(it, start)
    assert {name: f.rank for name, f in done.adapter.items()} == expected
    assert {expected[name] for name in expected} == {3, 40}
    assert {name: f.shape for name, f in done.adapter.items()} == it.shapes
    assert done.loss_after < done.loss_before
