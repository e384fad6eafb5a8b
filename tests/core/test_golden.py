"""The format is frozen: today's code writes the golden bytes and reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.core import codec
from edge_sdk.core.records import from_json
from tests.core import wire_samples
from tests.core.test_records import RECORDS as KINDS
from tests.core.wire_samples import GOLDEN, RANK, SCALING, SHAPES

FILES = wire_samples.files()
ADAPTER = GOLDEN / "adapter_model.safetensors"


def test_every_record_of_the_wire_has_a_golden_file() -> None:
    assert {type(record) for record in wire_samples.RECORDS} == set(KINDS)
    assert {path.name for path in GOLDEN.iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_the_bytes_are_the_same(name: str) -> None:
    assert FILES[name] == (GOLDEN / name).read_bytes()


@pytest.mark.parametrize("record", wire_samples.RECORDS, ids=lambda record: type(record).__name__)
def test_the_golden_record_is_read(record: object) -> None:
    text = (GOLDEN / f"{type(record).__name__}.json").read_text(encoding="utf-8")
    assert from_json(type(record), json.loads(text)) == record


def test_the_golden_adapter_is_read() -> None:
    file = codec.open_adapter(ADAPTER, SHAPES, RANK, SCALING, codec.max_adapter_bytes(SHAPES, RANK))
    read = dict(file.modules())
    assert list(read) == sorted(SHAPES)
    for name, factors in wire_samples.adapter().items():
        np.testing.assert_array_equal(read[name].b, factors.b)
        np.testing.assert_array_equal(read[name].a, factors.a)


def test_the_header_by_hand() -> None:
    """Length, JSON, data: `B` is stored without the scaling, `A` before `B`, modules in name order."""
    raw = ADAPTER.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    first, second = list(header)[:2]
    assert first == "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert second == "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    assert header[first] == {"dtype": "F32", "shape": [3, 6], "data_offsets": [0, 72]}
    assert header[second] == {"dtype": "F32", "shape": [4, 3], "data_offsets": [72, 120]}
    values = np.frombuffer(raw[8 + length :], "<f4")
    np.testing.assert_array_equal(values[:3], [1, 0.875, 0.75])
    np.testing.assert_array_equal(values[18:21], [-0.5, -0.4375, -0.375])  # halved: s = 2


def test_peft_reads_the_golden_adapter(tmp_path: Path) -> None:
    """PeftModel.from_pretrained on the golden folder adds exactly `B̃·A` to each module, narrow ones too."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())

    root = torch.nn.Module()
    for name, (out, inp) in SHAPES.items():
        at = root
        for part in name.split(".")[:-1]:
            if part not in dict(at.named_children()):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.add_module(name.split(".")[-1], torch.nn.Linear(inp, out, bias=False))
    before = {name: root.get_submodule(name).weight.detach().clone() for name in SHAPES}
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    config.task_type = None  # no language model here, only its named layers
    model = peft.PeftModel.from_pretrained(root, str(tmp_path), config=config)
    for name, factors in wire_samples.adapter().items():
        layer = model.base_model.model.get_submodule(name)
        delta = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(delta, factors.product(), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(layer.base_layer.weight.detach(), before[name])
