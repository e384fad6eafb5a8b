"""Step times: what the fit makes of hand-made measurements, and real steps of a cut-down model."""

from __future__ import annotations

import json
import time
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core.choice.model_facts import ModelFacts, facts_from_config
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.choice.step_time import StepTime, Work, fit, work
from edge_sdk.core.errors import InputError
from edge_sdk.model import base_model
from edge_sdk.model.files import read_config, resolve
from edge_sdk.trials.cut_down_model import cut_down
from edge_sdk.trials.step_times_child import LargestStep, step_times

# One block of one 6 × 4 layer, 10 logits.
SMALL = ModelFacts(
    shapes={"layers.0.mlp.up": (6, 4)},
    linear_parameters=24,
    other_parameters=0,
    hidden=4,
    layers=1,
    intermediate=6,
    heads=1,
    query_width=4,
    key_value_width=4,
    mlp_tensors=3,
    vocab=10,
)
PLAIN = Setting(Ranks.uniform(2), 0, sequence_len=8, micro_batch=4)


def test_work_by_hand() -> None:
    """32 tokens: 24 weights forward and backward, 7 · 8 · 4 for the scores, factors three times."""
    done = work(SMALL, PLAIN, batch=4)
    assert done.layer_passes == 1
    assert done.frozen_gflops * 1e9 == pytest.approx(32 * (2 * 24 * 2 + 2 * 8 * 4 * 3.5))
    assert done.trained_gflops * 1e9 == pytest.approx(32 * 2 * (2 * 10) * 3)
    assert done.carried_gflops == 0
    assert done.mega_logits * 1e6 == pytest.approx(32 * 10)


def test_smaller_micro_batches_read_the_weights_more_often_and_compute_the_same() -> None:
    whole, parts = (work(SMALL, replace(PLAIN, micro_batch=size), batch=4) for size in (4, 1))
    assert parts == replace(whole, layer_passes=4, micro_batches=4)


def test_recomputation_adds_half_a_pass_and_not_the_head() -> None:
    plain, again = (work(SMALL, replace(PLAIN, checkpointing=value), batch=4) for value in (False, True))
    assert again.layer_passes == 1.5 * plain.layer_passes
    assert again.frozen_gflops > plain.frozen_gflops
    assert again.mega_logits == plain.mega_logits


constants = st.floats(1e-3, 1e3)


@given(st.builds(StepTime, *[constants] * 6), st.integers(1, 4))
def test_a_fit_finds_the_constants_that_made_the_measurements(truth: StepTime, scale: int) -> None:
    truth = replace(
        truth,
        per_trained_gflop_s=truth.per_frozen_gflop_s + truth.per_trained_gflop_s,
        per_carried_gflop_s=truth.per_frozen_gflop_s + truth.per_carried_gflop_s,
    )
    units = [Work(*(float(scale + (i == j)) for j in range(6))) for i in range(6)]
    seconds = [sum(a * b for a, b in zip(astuple(unit), astuple(truth), strict=True)) for unit in units]
    assert astuple(fit(list(zip(units, seconds, strict=True)))) == pytest.approx(astuple(truth), rel=1e-4)


def test_no_constant_is_negative_where_measurements_contradict() -> None:
    found = fit([(Work(1, 1), 1.0), (Work(1, 2), 0.9), (Work(1, 3), 0.8)])
    assert found.per_frozen_gflop_s == 0
    assert found.per_layer_pass_s == pytest.approx(0.89, abs=0.02)


def test_carried_factors_that_were_not_measured_cost_what_trained_ones_do() -> None:
    found = fit([(Work(1), 1.0), (Work(0, 1), 2.0), (Work(0, 0, 1), 3.0)])
    assert (found.per_trained_gflop_s, found.per_carried_gflop_s) == (pytest.approx(3), pytest.approx(3))


@pytest.mark.parametrize("seconds", [[1.0, 2.0], [1.0, 2.0, 0.0], [1.0, 2.0, float("nan")]])
def test_what_is_no_measurement_is_refused(seconds: list[float]) -> None:
    with pytest.raises(InputError, match="three measured steps"):
        fit([(Work(1), value) for value in seconds])


# --- the cut-down model ---------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "attention_bias": True},
    "qwen3": {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 32,
        "layer_types": ["full_attention"] * 5,
    },
}
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "vocab_size": 5000,
    "tie_word_embeddings": False,
}
GPT2 = {"model_type": "gpt2", "n_embd": 128, "n_layer": 5, "n_head": 4, "vocab_size": 5000, "n_positions": 64}
ALL = {**{name: {**SHAPE, **values} for name, values in CONFIGS.items()}, "gpt2": GPT2}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("quantise", [True, False])
def test_a_cut_down_model_has_the_blocks_of_the_whole(name: str, quantise: bool, tmp_path: Path) -> None:
    """Same layers in every block, finite values throughout, and 4-bit layers where they are wanted."""
    (tmp_path / "config.json").write_text(json.dumps(ALL[name]))
    whole = base_model.target_modules(tmp_path)
    base, facts = cut_down(ALL[name], 2, "cpu", quantise)
    assert facts.layers == 2
    assert facts.shapes == {m: shape for m, shape in whole.items() if ".0." in m or ".1." in m}
    ids = torch.arange(24)[None]
    with torch.no_grad():
        logits = base.model(input_ids=ids, use_cache=False).logits
    assert torch.isfinite(logits).all()
    assert not any(tensor.is_meta for tensor in [*base.model.parameters(), *base.model.buffers()])
    kinds = {type(base.model.get_submodule(module)).__name__ for module in facts.shapes}
    assert ("Linear4bit" in kinds) == quantise


def test_repeated_four_bit_weights_are_what_quantising_them_would_give() -> None:
    from bitsandbytes.functional import dequantize_4bit

    from edge_sdk.trials.cut_down_model import LARGEST_VALUE, _four_bit, filled

    cpu = torch.device("cpu")
    layer = _four_bit(300, 1000, cpu, torch.float32)  # more than the pattern, and no multiple of it
    held = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert held.shape == (300, 1000)
    assert (held - filled((300, 1000), cpu, torch.float32)).abs().max() < 0.2 * LARGEST_VALUE


def test_calibration_of_tiny() -> None:
    """Every kind of work costs something, and more of it costs more."""
    config = read_config(resolve("tiny"))
    facts = facts_from_config(config, base_model.target_modules(resolve("tiny")))
    largest = LargestStep(2, 64, (Ranks.uniform(2), Ranks.uniform(32)), carries=True)
    times = step_times(config, largest, "cpu")
    assert min(astuple(times)) >= 0
    assert times.per_mega_logit_s > 0
    assert times.per_layer_pass_s + times.per_frozen_gflop_s > 0

    def step_s(batch: int = 2, **changes: Any) -> float:
        return times.step_s(facts, replace(Setting(Ranks.uniform(8), 0, 64, 2), **changes), batch)

    assert 0 < step_s() < step_s(batch=4)
    assert step_s(ranks=Ranks.uniform(32)) >= step_s()
    assert step_s(checkpointing=True) > step_s()
    assert step_s(micro_batch=1) >= step_s()
    assert step_s(carry_rank=32) >= step_s()


def test_a_vocabulary_smaller_than_the_cut_down_one() -> None:
    # Processor time: steps of a millisecond on the clock say little beside other work.
    largest = LargestStep(1, 16, (Ranks.uniform(2),))
    times = step_times(ALL["llama"] | {"vocab_size": 40}, largest, "cpu", clock=time.process_time)
    assert times.per_layer_pass_s + times.per_frozen_gflop_s > 0


def test_a_configuration_that_is_none() -> None:
    with pytest.raises(InputError, match="model_type is missing"):
        cut_down(SHAPE, 1)
    with pytest.raises(InputError, match="takes no such configuration.*zork"):
        cut_down({**SHAPE, "model_type": "zork"}, 1)
