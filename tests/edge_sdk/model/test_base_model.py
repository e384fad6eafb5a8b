"""Finding, identifying and loading base models: shapes without weights, fingerprints, NF4, bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from edge_sdk.core.errors import InputError
from edge_sdk.model import base_model, files
from edge_sdk.model.base_model import describe, load
from edge_sdk.model.files import resolve
from tests.models import ARCHITECTURES, Architecture, build_model

Directories = Mapping[Architecture, Path]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    return {name: build_model(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}


def test_targets_are_the_linear_layers_of_the_blocks(directories: Directories) -> None:
    gpt2 = describe(str(directories["gpt2"])).modules
    assert {name.split(".h.0.")[1]: shape for name, shape in gpt2.items() if ".h.0." in name} == {
        "attn.c_attn": (192, 64),
        "attn.c_proj": (64, 64),
        "mlp.c_fc": (256, 64),
        "mlp.c_proj": (64, 256),
    }
    for name in ("llama", "qwen"):
        modules = describe(str(directories[name])).modules
        assert {m.split(".layers.1.")[1]: shape for m, shape in modules.items() if ".layers.1." in m} == {
            "self_attn.q_proj": (64, 64),
            "self_attn.k_proj": (16, 64),
            "self_attn.v_proj": (16, 64),
            "self_attn.o_proj": (64, 64),
            "mlp.gate_proj": (96, 64),
            "mlp.up_proj": (96, 64),
            "mlp.down_proj": (64, 96),
        }
        assert len(modules) == 14


def test_named_targets(directories: Directories) -> None:
    llama = str(directories["llama"])
    some = describe(llama, "q_proj, v_proj")
    assert sorted({name.rsplit(".", 1)[1] for name in some.modules}) == ["q_proj", "v_proj"]
    assert some.fingerprint != describe(llama).fingerprint
    # What a device does: it asks for the federation's modules by their full names.
    assert describe(llama, ",".join(some.modules)).fingerprint == some.fingerprint
    with pytest.raises(InputError, match="target 'qproj' is no linear layer of .* it has down_proj"):
        describe(llama, "qproj")


def test_the_fingerprint_follows_what_the_model_is(directories: Directories, tmp_path: Path) -> None:
    original = describe(str(directories["llama"])).fingerprint
    copy = shutil.copytree(directories["llama"], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config.update(transformers_version="9.9", dtype="float16", _name_or_path="elsewhere")
    (copy / "config.json").write_text(json.dumps(config, indent=7))
    (copy / "README.md").write_text("not part of it")
    assert describe(str(copy)).fingerprint == original

    def changed(name: str, content: bytes) -> str:
        other = shutil.copytree(copy, tmp_path / name.replace(".", "_"))
        (other / name).write_bytes(content)
        return describe(str(other)).fingerprint

    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    config["rms_norm_eps"] = 1e-3
    assert changed("model.safetensors", bytes(weights)) != original
    assert changed("config.json", json.dumps(config).encode()) != original
    assert changed("chat_template.jinja", b"{{ messages }}") != original


def test_describing_loads_no_weights(directories: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(base_model.AutoModelForCausalLM, "from_pretrained", refuse)
    assert describe(str(directories["qwen"])).modules


def test_digests_are_remembered_until_a_file_changes(
    directories: Directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(directories["llama"], tmp_path / "copy")
    read: list[str] = []
    whole = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: (read.append(path.name), whole(path))[1])
    remembered = tmp_path / "cache" / "digests.json"
    first = describe(str(copy), digests=remembered).fingerprint
    assert "model.safetensors" in read
    read.clear()
    assert describe(str(copy), digests=remembered).fingerprint == first
    assert read == []
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert describe(str(copy), digests=remembered).fingerprint == first
    assert read == ["model.safetensors"]
    remembered.write_text("damaged")
    assert describe(str(copy), digests=remembered).fingerprint == first


def test_only_the_weights_that_would_be_loaded_count(directories: Directories, tmp_path: Path) -> None:
    copy = shutil.copytree(directories["llama"], tmp_path / "copy")
    original = describe(str(copy)).fingerprint
    (copy / "consolidated.safetensors").write_bytes(b"another form of the same weights")
    assert describe(str(copy)).fingerprint == original
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    with pytest.raises(InputError, match=r"part-1.safetensors is missing"):
        describe(str(copy))
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="names no weight files"):
        describe(str(copy))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nf4_is_doubly_quantised_and_frozen(directories: Directories, architecture: Architecture) -> None:
    directory = str(directories[architecture])
    base = load(directory, device="cpu")
    assert base.quantised
    assert not base.fan_in_fan_out  # Conv1D has become a transposed Linear4bit
    for name, (out_features, in_features) in describe(directory).modules.items():
        layer = base.model.get_submodule(name)
        assert isinstance(layer, bitsandbytes.nn.Linear4bit)
        state = layer.weight.quant_state
        assert (layer.out_features, layer.in_features) == (out_features, in_features)
        assert state.quant_type == "nf4"
        assert state.nested
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not isinstance(base.model.get_output_embeddings(), bitsandbytes.nn.Linear4bit)
    assert base.max_positions == 128


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_not_quantising_is_a_choice(directories: Directories, architecture: Architecture) -> None:
    base = load(str(directories[architecture]), device="cpu", quantise=False, dtype="float32")
    assert not base.quantised
    assert base.fan_in_fan_out == (architecture == "gpt2")
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}


def test_bfloat16_where_the_processor_has_it(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        assert load(str(directories["llama"]), device="cpu").model.dtype == dtype


def test_a_tokeniser_without_a_pad_token_pads_with_eos(directories: Directories, tmp_path: Path) -> None:
    copy = shutil.copytree(directories["llama"], tmp_path / "copy")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load(str(copy), device="cpu").tokenizer.pad_token_id == 2
    del settings["eos_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="has no eos token"):
        load(str(copy), device="cpu")


def test_broken_models_are_one_line(directories: Directories, tmp_path: Path) -> None:
    def broken(name: str, content: str) -> str:
        copy = shutil.copytree(directories["llama"], tmp_path / name.replace(".", "_"))
        (copy / name).write_text(content)
        return str(copy)

    damaged = broken("model.safetensors", "not safetensors")
    cases = [
        (lambda: load(damaged, device="cpu"), "weights cannot be loaded"),
        (lambda: describe(broken("config.json", '{"model_type": "no-such"}')), "cannot build this model"),
        (lambda: load(broken("tokenizer.json", "{"), device="cpu"), "tokeniser cannot be loaded"),
        (lambda: load(str(directories["llama"]), device="cuda:99"), "device 'cuda:99' is not available"),
        (lambda: load(str(directories["llama"]), device="toaster"), "device 'toaster' is not available"),
    ]
    for call, says in cases:
        with pytest.raises(InputError) as caught:
            call()
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_weights_are_not_made_up(directories: Directories, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(directories["llama"], tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights are missing, model.layers.1.mlp.up_proj.weight"):
        load(str(copy), device="cpu", quantise=False)


def test_places_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model directory"):
        resolve(str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"holds no config.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("someone/something", "cannot be reached"),
        ("not a valid id!", "no such model on the Hugging Face hub"),
    ],
)
def test_the_hub_out_of_reach_is_one_line(model: str, says: str, tmp_path: Path) -> None:
    code = (
        "import sys; from edge_sdk.model.files import resolve; from edge_sdk.core.errors import InputError\n"
        "try: resolve(sys.argv[1])\nexcept InputError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, model]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert says in output.stdout
    assert output.stdout.count("\n") == 1
