"""The format is frozen: today's code writes the golden bytes and reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.core.adapter_file import codec
from edge_sdk.core.adapter_file.dtypes import WireDtype
from edge_sdk.core.messages import Federation
from edge_sdk.core.records import decode, from_json
from tests.edge_sdk.core import wire_samples
from tests.edge_sdk.core.test_records import RECORDS as KINDS
from tests.edge_sdk.core.wire_samples import GOLDEN, RANK, SCALING, SHAPES

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
    assert decode(type(record), text) == decode(type(record), text.encode()) == record


def test_the_golden_adapter_is_read() -> None:
    file = codec.open_adapter(ADAPTER, SHAPES, RANK, SCALING, codec.max_adapter_bytes(SHAPES, RANK))
    read = dict(file.modules())
    assert list(read) == sorted(SHAPES)
    for name, factors in wire_samples.adapter().items():
        np.testing.assert_array_equal(read[name].b, factors.b)
        np.testing.assert_array_equal(read[name].a, factors.a)


@pytest.mark.parametrize(("dtype", "step"), [("float16", 0.0), ("int8", 0.5 / 127)])
def test_the_golden_lossy_adapters_are_read(dtype: WireDtype, step: float) -> None:
    """Eighths are exact in float16; in int8 they are within half a scale."""
    path = GOLDEN / f"adapter_{dtype}.safetensors"
    file = codec.open_adapter(path, SHAPES, RANK, SCALING, codec.max_adapter_bytes(SHAPES, RANK, dtype))
    read = dict(file.modules())
    assert list(read) == sorted(SHAPES)
    for name, factors in wire_samples.adapter().items():
        np.testing.assert_allclose(read[name].b, factors.b, atol=1.001 * step * np.abs(factors.b).max())
        np.testing.assert_allclose(read[name].a, factors.a, atol=1.001 * step * np.abs(factors.a).max())


def test_the_int8_header_by_hand() -> None:
    """One row a component, of B too; the values first, then the scales of their blocks."""
    raw = (GOLDEN / "adapter_int8.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "edge-sdk int8 blocks of 64"}
    stem = "base_model.model.model.layers.0.mlp.up_proj"
    first = {name: header[name] for name in list(header)[:4]}
    assert first == {
        f"{stem}.lora_A.int8": {"dtype": "I8", "shape": [3, 6], "data_offsets": [0, 18]},
        f"{stem}.lora_B.int8": {"dtype": "I8", "shape": [3, 4], "data_offsets": [18, 30]},
        f"{stem}.lora_A.scales": {"dtype": "F32", "shape": [3, 1], "data_offsets": [30, 42]},
        f"{stem}.lora_B.scales": {"dtype": "F32", "shape": [3, 1], "data_offsets": [42, 54]},
    }
    data = raw[8 + length :]
    # The first row of A is 1, 7/8, 6/8, 5/8, 4/8, 3/8: times 127.
    np.testing.assert_array_equal(np.frombuffer(data[:6], np.int8), [127, 111, 95, 79, 64, 48])
    assert np.frombuffer(data[30:34], "<f4")[0] == np.float32(1 / 127)


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


def linear_layers() -> Any:
    """A torch module with a linear layer of random weights at every name of SHAPES."""
    torch = pytest.importorskip("torch")
    root = torch.nn.Module()
    for name, (out, inp) in SHAPES.items():
        at = root
        for part in name.split(".")[:-1]:
            if part not in dict(at.named_children()):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.add_module(name.split(".")[-1], torch.nn.Linear(inp, out, bias=False))
    return root


def loaded_by_peft(root: Any, folder: Path, file: str) -> Any:
    """PeftModel.from_pretrained on a golden file, as an adapter of `root`."""
    peft = pytest.importorskip("peft")
    (folder / "adapter_model.safetensors").write_bytes((GOLDEN / file).read_bytes())
    (folder / "adapter_config.json").write_bytes((GOLDEN / "adapter_config.json").read_bytes())
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.task_type = None  # no language model here, only its named layers
    return peft.PeftModel.from_pretrained(root, str(folder), config=config)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_float16.safetensors"])
def test_peft_reads_the_golden_adapter(tmp_path: Path, file: str) -> None:
    """It adds exactly `B̃·A` to each module, narrow ones too."""
    root = linear_layers()
    before = {name: root.get_submodule(name).weight.detach().clone() for name in SHAPES}
    model = loaded_by_peft(root, tmp_path, file)
    for name, factors in wire_samples.adapter().items():
        layer = model.base_model.model.get_submodule(name)
        delta = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(delta, factors.product(), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(layer.base_layer.weight.detach(), before[name])


def test_peft_says_that_it_cannot_read_int8(tmp_path: Path) -> None:
    """Our names are not PEFT's, so that integers are not taken for weights: nothing is added."""
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model = loaded_by_peft(linear_layers(), tmp_path, "adapter_int8.safetensors")
    for name in SHAPES:
        assert not model.base_model.model.get_submodule(name).get_delta_weight("default").any()


# --- records from before a field existed ----------------------------------------------------------


@pytest.mark.parametrize(("rule", "carries"), [("carry", True), ("flora", True), ("flexlora", False)])
def test_a_federation_from_before_rules_came_from_elsewhere_carries_by_the_rule_s_name(
    rule: str, carries: bool
) -> None:
    record = json.loads((GOLDEN / "Federation.json").read_text())
    assert record.pop("holds_global") is True
    older = from_json(Federation, record | {"rule": rule})
    assert older.holds_global is None
    assert older.carries is carries


@pytest.mark.parametrize("holds", [True, False])
def test_a_federation_says_itself_whether_its_devices_carry(holds: bool) -> None:
    record = json.loads((GOLDEN / "Federation.json").read_text())
    newer = from_json(Federation, record | {"rule": "somebody.rules:Own", "holds_global": holds})
    assert newer.carries is holds
