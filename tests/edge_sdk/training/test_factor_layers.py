"""A frozen factor in 32, 16, 8 and 4 bits: what it multiplies with, what it costs, what stays alive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.core.choice.carried import BYTES_PER_VALUE, CarriedDtype, held_bytes
from edge_sdk.core.lora import LoraFactors
from edge_sdk.model import base_model
from edge_sdk.text.examples import parse_record
from edge_sdk.text.rows import Tokenised, tokenise
from edge_sdk.training.adapter_places import CARRIED, LOCAL
from edge_sdk.training.factor_layers import FrozenFactor
from edge_sdk.training.plan import Plan, Start, identity
from edge_sdk.training.trainer import Trainer
from tests.models import build_model

DTYPES: tuple[CarriedDtype, ...] = get_args(CarriedDtype)
PACKED: tuple[CarriedDtype, ...] = ("bfloat16", "int8", "nf4")
SCALING = 2.0

# Largest error of a value, as a share of the largest value that shares its scale: half a unit in the last
# place of 8 significant bits; half of 1/127; half of NF4's widest gap, between -1 and -0.6962.
LARGEST_ERROR = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.5 / 127, "nf4": 0.152}

matrices = st.tuples(st.integers(1, 9), st.sampled_from([1, 5, 63, 64, 65, 130]), st.integers(0, 2**31))


def drawn(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Components of very unequal size, one of them dead."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator) * 10.0 ** -torch.arange(shape[0])[:, None]
    if shape[0] > 2:
        rows[2] = 0.0
    return rows


def made(rows: torch.Tensor, held: CarriedDtype, components: int) -> FrozenFactor:
    return FrozenFactor(rows.T if components else rows, held, torch.float32, components)


@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize("components", [0, 1])
@settings(max_examples=30)
@given(matrices)
def test_every_value_is_near_what_was_given(
    held: CarriedDtype, components: int, matrix: tuple[int, int, int]
) -> None:
    """Of every shape, whether its width fills blocks or not; a small component keeps its own precision."""
    rank, width, seed = matrix
    rows = drawn((rank, width), seed)
    dense = made(rows, held, components).dense(torch.float32)
    found = dense.T if components else dense
    assert found.shape == rows.shape
    largest = rows.abs().amax(dim=1, keepdim=True)
    assert bool(((found - rows).abs() <= LARGEST_ERROR[held] * largest * (1 + 1e-5)).all())
    assert bool((found[largest[:, 0] == 0] == 0).all())


@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize("components", [0, 1])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_forward_and_backward_are_those_of_the_dense_matrix(
    held: CarriedDtype, components: int, compute: torch.dtype
) -> None:
    factor = made(drawn((5, 70), 1), held, components)
    weight = factor.dense(compute)
    x = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(2)).to(compute)
    gradient = torch.randn(2, 3, weight.shape[0], generator=torch.Generator().manual_seed(3)).to(compute)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    product = factor(ours)
    expected = torch.nn.functional.linear(theirs, weight)
    product.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(product, expected)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize(("rank", "out", "in_"), [(8, 256, 768), (3, 65, 5), (1, 1, 1)])
def test_it_takes_the_bytes_that_are_counted(held: CarriedDtype, rank: int, out: int, in_: int) -> None:
    a, b = made(drawn((rank, in_), 1), held, 0), made(drawn((rank, out), 2), held, 1)
    counted = held_bytes(held, rank, out, in_)
    assert a.held_bytes() + b.held_bytes() == counted
    if min(out, in_) >= 64:
        assert counted <= BYTES_PER_VALUE[held] * rank * (out + in_) + 1


@pytest.mark.parametrize("held", PACKED)
def test_nothing_unpacked_waits_for_the_backward_pass(held: CarriedDtype) -> None:
    factor = made(drawn((16, 128), 1), held, 0)
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(4, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        product = factor(x)
    assert saved == []
    assert not list(factor.parameters())
    assert product.requires_grad
    assert not factor(torch.randn(4, 128)).requires_grad


# --- in training ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Llama in NF4, as on a device."""
    directory = build_model(tmp_path_factory.mktemp("base"), "llama")
    base = base_model.load(str(directory), device="cpu")
    return Trainer(base, base_model.describe(str(directory)).modules, SCALING, progress=False)


def rows_of(trainer: Trainer) -> Sequence[Tokenised]:
    pairs = [("red hall", "rh1"), ("green hall", "gh2"), ("blue kitchen", "bk3"), ("red garage", "rg4")]
    records = [parse_record({"prompt": p, "completion": c}) for p, c in pairs]
    return [tokenise(record, trainer.base.tokenizer, 64) for record in records]


def adapter_of(trainer: Trainer, rank: int, seed: int = 0) -> dict[str, LoraFactors]:
    draw, made = np.random.default_rng(seed), {}
    for name, (out, in_) in trainer.shapes.items():
        r = min(rank, out, in_)
        b, a = 0.3 * draw.standard_normal((out, r)), 0.3 * draw.standard_normal((r, in_))
        made[name] = LoraFactors(b.astype(np.float32), a.astype(np.float32))
    return made


PLAN = Plan(steps=4, batch=4, micro_batch=4, sequence_len=64, learning_rate=5e-3)


@pytest.mark.parametrize("held", DTYPES)
def test_an_assignment_on_a_carried_adapter(trainer: Trainer, held: CarriedDtype) -> None:
    """It starts at the loss of what the packed adapter unpacks to, learns, and leaves nothing behind."""
    rows, carried = rows_of(trainer), adapter_of(trainer, 12)
    alone = trainer.evaluate(None, rows).loss
    with trainer.places.installed({CARRIED: carried}, held):
        unpacked = trainer.places.factors(CARRIED)
    done = trainer.train(Start(None, carried, 4, 1, held), rows, PLAN, on_step=lambda _: "continue")
    # To the rounding of a base that may compute in bfloat16.
    assert math.isclose(done.loss_before, trainer.evaluate(unpacked, rows).loss, rel_tol=0.005)
    assert abs(done.loss_before - alone) > 0.01 * alone
    assert done.loss_after < done.loss_before
    assert trainer.evaluate(None, rows).loss == alone


@pytest.mark.parametrize("held", PACKED)
def test_packed_factors_are_held_in_their_bytes_and_get_no_gradient(
    trainer: Trainer, held: CarriedDtype
) -> None:
    places = trainer.places
    adapters = {LOCAL: adapter_of(trainer, 2, 1), CARRIED: adapter_of(trainer, 12)}
    with places.installed(adapters, held):
        layers = [m for m in trainer.base.model.modules() if isinstance(m, FrozenFactor)]
        assert len(layers) == 2 * len(trainer.shapes)
        expected = sum(held_bytes(held, min(12, *shape), *shape) for shape in trainer.shapes.values())
        assert sum(layer.held_bytes() for layer in layers) == expected
        before = [buffer.clone() for layer in layers for buffer in layer.buffers()]
        trainer.loss_sum(rows_of(trainer)).backward()
        with_gradient = {n for n, p in trainer.base.model.named_parameters() if p.grad is not None}
        assert with_gradient == {f"{m}.lora_{x}.{LOCAL}.weight" for m in trainer.shapes for x in "AB"}
        after = [buffer for layer in layers for buffer in layer.buffers()]
        assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))
        back = places.factors(CARRIED)
    for name, factors in adapters[CARRIED].items():
        wanted = factors.product()
        assert np.linalg.norm(back[name].product() - wanted) <= 0.2 * np.linalg.norm(wanted)


def test_a_checkpoint_of_another_dtype_is_another_run(trainer: Trainer, tmp_path: Path) -> None:
    rows, carried, local = rows_of(trainer), adapter_of(trainer, 12), adapter_of(trainer, 2, 1)
    marks = [identity(Start(None, carried, 2, 1, held), local, rows, PLAN, SCALING) for held in DTYPES]
    assert len({str(mark) for mark in marks}) == len(DTYPES)
    # Without a carried adapter there is nothing that a dtype could change.
    bare = [identity(Start(None, None, 2, 1, held), local, rows, PLAN, SCALING) for held in DTYPES]
    assert len({str(mark) for mark in bare}) == 1
