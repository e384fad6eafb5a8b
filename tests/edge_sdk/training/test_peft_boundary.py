"""What PEFT makes of our adapters, and we of PEFT's: the same update, for every kind of linear layer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from edge_sdk.core.adapter_file import codec
from edge_sdk.core.lora import LoraFactors
from edge_sdk.model import base_model
from edge_sdk.training.adapter_places import CARRIED, AdapterPlaces
from tests.models import ARCHITECTURES, Architecture, build_model

SCALING = 2.5
IDS = torch.tensor([[1, 30, 40, 50, 60, 70, 80, 2]])


@pytest.fixture(params=ARCHITECTURES)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    architecture: Architecture = request.param
    return build_model(tmp_path / "base", architecture)


def random_adapter(shapes: codec.Shapes, rank: int) -> dict[str, LoraFactors]:
    draw = np.random.default_rng(0)
    adapter = {}
    for name, (out, in_) in shapes.items():
        r = min(rank, out, in_)
        b, a = 0.2 * draw.standard_normal((out, r)), 0.2 * draw.standard_normal((r, in_))
        adapter[name] = LoraFactors(b.astype(np.float32), a.astype(np.float32))
    return adapter


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
# PEFT finds GPT-2's Conv1D by itself and says so: the exported configuration is the same for every model.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
@pytest.mark.parametrize("quantise", [True, False])
@pytest.mark.parametrize("rank", [3, 32])  # 32 is more than k_proj and v_proj hold
def test_peft_loads_an_exported_adapter_to_the_same_logits(
    directory: Path, tmp_path: Path, rank: int, quantise: bool
) -> None:
    shapes = base_model.describe(str(directory)).modules
    adapter = random_adapter(shapes, rank)
    exported = tmp_path / "adapter"
    exported.mkdir()
    (exported / "adapter_model.safetensors").write_bytes(codec.encode(adapter, SCALING))
    config = codec.peft_config(str(directory), shapes, rank, SCALING)
    (exported / "adapter_config.json").write_text(json.dumps(config))

    def load() -> base_model.LoadedBase:
        return base_model.load(str(directory), device="cpu", quantise=quantise, dtype="float32")

    ours = load()
    alone = logits(ours.model)
    with AdapterPlaces(ours, shapes, SCALING).installed({CARRIED: adapter}):
        expected = logits(ours.model)
    torch.testing.assert_close(logits(ours.model), alone, rtol=0, atol=0)  # taken out again, no trace is left
    theirs = PeftModel.from_pretrained(load().model, exported)
    assert float((expected - alone).abs().max()) > 0.1
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantise", [True, False])
def test_the_update_in_peft_is_the_product(directory: Path, quantise: bool) -> None:
    shapes = base_model.describe(str(directory)).modules
    base = base_model.load(str(directory), device="cpu", quantise=quantise, dtype="float32")
    adapter = random_adapter(shapes, 20)
    places = AdapterPlaces(base, shapes, SCALING)
    with places.installed({CARRIED: adapter}):
        for name, factors in adapter.items():
            delta = base.model.get_submodule(name).get_delta_weight(CARRIED).numpy()
            product = factors.product().T if base.fan_in_fan_out else factors.product()
            np.testing.assert_allclose(delta, product, rtol=1e-4, atol=1e-5)
        back = places.factors(CARRIED)
    for name, factors in adapter.items():
        np.testing.assert_allclose(back[name].product(), factors.product(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("rslora", [True, False])
def test_any_peft_adapter_folds_to_its_update(directory: Path, rslora: bool) -> None:
    """rsLoRA, alpha_pattern and rank_pattern, on Linear and Conv1D."""
    base = base_model.load(str(directory), device="cpu", quantise=False, dtype="float32")
    first, second = sorted(base_model.describe(str(directory)).modules)[:2]
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        use_rslora=rslora,
        target_modules=[first, second],
        rank_pattern={first: 9},
        alpha_pattern={first: 5, second.rsplit(".", 1)[1]: 7},
        fan_in_fan_out=base.fan_in_fan_out,
        init_lora_weights=False,
    )
    model = get_peft_model(base.model, config)
    tensors = {name: t.detach().numpy() for name, t in get_peft_model_state_dict(model).items()}
    folded = codec.from_peft(config.to_dict(), tensors)
    assert sorted(folded) == [first, second]
    assert (folded[first].rank, folded[second].rank) == (9, 4)
    for name, factors in folded.items():
        delta = base.model.get_submodule(name).get_delta_weight("default").detach().numpy()
        product = factors.product().T if base.fan_in_fan_out else factors.product()
        np.testing.assert_allclose(delta, product, rtol=1e-4, atol=1e-5)


def test_taking_a_base_over_warns_of_nothing(directory: Path) -> None:
    shapes = base_model.describe(str(directory)).modules
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for quantise in (True, False):
            base = base_model.load(str(directory), device="cpu", quantise=quantise)
            with AdapterPlaces(base, shapes, SCALING).installed({CARRIED: random_adapter(shapes, 4)}):
                logits(base.model)
