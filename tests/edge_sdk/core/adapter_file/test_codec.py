"""Adapters to bytes and back, in memory, in pieces and through PEFT's config."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from edge_sdk.core.adapter_file import codec
from edge_sdk.core.adapter_file.dtypes import WIRE_DTYPES, WireDtype
from edge_sdk.core.errors import AdapterError, TooLarge
from edge_sdk.core.lora import LoraFactors, Matrix
from tests.edge_sdk.core.draws import factors, seeds

NAME = st.from_regex(r"model(\.[a-z_0-9]{1,8}){1,3}", fullmatch=True)


@st.composite
def adapters(draw: st.DrawFn) -> tuple[dict[str, LoraFactors], int]:
    """An adapter of one rank, where a module narrower than it holds min(out, in), and that rank."""
    rank = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(seeds))
    names = draw(st.lists(NAME, min_size=1, max_size=4, unique=True))
    made = {}
    for name in names:
        out, inp = draw(st.integers(1, 16)), draw(st.integers(1, 16))
        made[name] = factors(rng, out, inp, min(rank, out, inp))
    return made, rank


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("codec") / "adapter_model.safetensors"


@given(drawn=adapters(), scaling=st.sampled_from([1.0, 2.0, 0.3, 16.0]))
def test_round_trip(path: Path, drawn: tuple[dict[str, LoraFactors], int], scaling: float) -> None:
    adapter, rank = drawn
    shapes = {name: f.shape for name, f in adapter.items()}
    path.write_bytes(codec.encode(adapter, scaling))
    file = codec.open_adapter(path, shapes, rank, scaling, codec.max_adapter_bytes(shapes, rank))
    assert file.ranks == {name: f.rank for name, f in adapter.items()}
    read = dict(file.modules())
    assert list(read) == sorted(adapter)
    for name, f in adapter.items():
        np.testing.assert_allclose(read[name].b, f.b, rtol=3e-7)
        np.testing.assert_array_equal(read[name].a, f.a)
        one = file.module(name)
        np.testing.assert_array_equal(one.b, read[name].b)
        assert one.b.dtype == one.a.dtype == np.float32
    own = codec.open_own(path, scaling)
    assert own.ranks == file.ranks


@given(drawn=adapters())
def test_safetensors_reads_what_we_write(drawn: tuple[dict[str, LoraFactors], int]) -> None:
    adapter, _ = drawn
    tensors = load_tensors(codec.encode(adapter, 2.0))
    assert len(tensors) == 2 * len(adapter)
    for name, f in adapter.items():
        np.testing.assert_array_equal(tensors[f"base_model.model.{name}.lora_A.weight"], f.a)
        np.testing.assert_array_equal(tensors[f"base_model.model.{name}.lora_B.weight"], f.b / 2)


@given(drawn=adapters(), dtype=st.sampled_from(["float16", "int8"]))
def test_lossy_round_trip(path: Path, drawn: tuple[dict[str, LoraFactors], int], dtype: WireDtype) -> None:
    """Within half a step of the largest value of a component: 2^-11 of it, or 1/254."""
    adapter, rank = drawn
    shapes = {name: f.shape for name, f in adapter.items()}
    path.write_bytes(codec.encode(adapter, 2.0, dtype))
    file = codec.open_adapter(path, shapes, rank, 2.0, codec.max_adapter_bytes(shapes, rank, dtype))
    assert file.ranks == codec.open_own(path, 2.0).ranks == {name: f.rank for name, f in adapter.items()}
    step = 1 / 253 if dtype == "int8" else 2.0**-11
    for name, read in file.modules():
        f = adapter[name]
        assert read.b.dtype == read.a.dtype == np.float32
        assert (np.abs(read.b - f.b) <= step * np.abs(f.b).max(axis=0) + 1e-7).all()
        assert (np.abs(read.a - f.a) <= step * np.abs(f.a).max(axis=1, keepdims=True) + 1e-7).all()


@given(drawn=adapters(), dtype=st.sampled_from(WIRE_DTYPES), chance=st.randoms(use_true_random=False))
def test_tensors_may_lie_in_any_order(
    path: Path, drawn: tuple[dict[str, LoraFactors], int], dtype: WireDtype, chance: random.Random
) -> None:
    """Whether a module's tensors lie side by side or apart, and on whatever byte they begin."""
    adapter, rank = drawn
    path.write_bytes(codec.encode(adapter, 2.0, dtype))
    wanted = dict(codec.open_own(path, 2.0).modules())
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:begin])
    names = [name for name in header if name != "__metadata__"]
    chance.shuffle(names)
    data = b""
    for name in names:
        first, last = header[name]["data_offsets"]
        header[name]["data_offsets"] = [len(data), len(data) + last - first]
        data += whole[begin + first : begin + last]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    shapes = {name: f.shape for name, f in adapter.items()}
    file = codec.open_adapter(path, shapes, rank, 2.0, codec.max_adapter_bytes(shapes, rank, dtype))
    for name, read in file.modules():
        np.testing.assert_array_equal(read.b, wanted[name].b)
        np.testing.assert_array_equal(read.a, wanted[name].a)


def test_a_module_that_cannot_be_packed_is_named() -> None:
    f = LoraFactors(np.full((3, 1), 1e5, np.float32), np.full((1, 2), 1e5, np.float32))
    with pytest.raises(AdapterError, match="module layers.3.q exceeds float16"):
        codec.encode({"layers.3.q": f}, 1.0, "float16")


@given(drawn=adapters())
def test_the_same_values_are_the_same_bytes(drawn: tuple[dict[str, LoraFactors], int]) -> None:
    adapter, _ = drawn
    turned = {
        name: LoraFactors(np.asfortranarray(f.b), np.asfortranarray(f.a))
        for name, f in reversed(adapter.items())
    }
    for dtype in WIRE_DTYPES:
        assert codec.encode(turned, 2.0, dtype) == codec.encode(adapter, 2.0, dtype)


def test_float16_is_read(path: Path) -> None:
    a, b = np.full((2, 5), 0.5, np.float16), np.full((4, 2), 0.25, np.float16)
    tensors = {codec.PREFIX + "x" + codec.WEIGHT_A: a, codec.PREFIX + "x" + codec.WEIGHT_B: b}
    path.write_bytes(save_tensors(tensors))
    read = codec.open_adapter(path, {"x": (4, 5)}, 2, 2.0, 10_000).module("x")
    np.testing.assert_array_equal(read.product(), np.full((4, 5), 0.5, np.float32))


def test_chunks_must_be_what_the_header_announced() -> None:
    rng = np.random.default_rng(0)
    f = factors(rng, 4, 5, 2)
    with pytest.raises(AdapterError, match="module y is not the x"):
        b"".join(codec.encode_chunks({"x": (4, 5)}, {"x": 2}, 1.0, [("y", f)]))
    with pytest.raises(AdapterError, match="module x"):
        b"".join(codec.encode_chunks({"x": (4, 5)}, {"x": 3}, 1.0, [("x", f)]))


@given(drawn=adapters())
def test_the_cap_of_a_rank_holds_its_adapter(drawn: tuple[dict[str, LoraFactors], int]) -> None:
    adapter, rank = drawn
    shapes = {name: f.shape for name, f in adapter.items()}
    for dtype in WIRE_DTYPES:
        assert len(codec.encode(adapter, 1.0, dtype)) <= codec.max_adapter_bytes(shapes, rank, dtype)


def test_a_file_over_its_cap_is_refused_before_it_is_read(path: Path) -> None:
    path.write_bytes(b"x" * 101)
    with pytest.raises(TooLarge, match="101 bytes, more than the 100"):
        codec.open_adapter(path, {"x": (4, 5)}, 2, 1.0, 100)


# --- PEFT's config --------------------------------------------------------------------------------


@given(drawn=adapters(), scaling=st.sampled_from([1.0, 2.0, 0.5]))
def test_config_and_tensors_fold_back(drawn: tuple[dict[str, LoraFactors], int], scaling: float) -> None:
    """What peft computes from our file and our config is the product that we put in."""
    adapter, rank = drawn
    config = codec.peft_config("tiny", {name: f.shape for name, f in adapter.items()}, rank, scaling)
    back = codec.from_peft(config, load_tensors(codec.encode(adapter, scaling)))
    assert set(back) == set(adapter)
    for name, f in adapter.items():
        np.testing.assert_allclose(back[name].product(), f.product(), rtol=1e-5, atol=1e-6 * f.norm())


def test_folding_by_hand() -> None:
    """s of r = 4: 16/4 = 4; of up, r = 2 and alpha 8: 4; with rsLoRA 16/√4 = 8 and 8/√2."""
    tensors: dict[str, Matrix] = {}
    for name, r in (("q", 4), ("up", 2)):
        tensors[codec.PREFIX + name + codec.WEIGHT_A] = np.ones((r, 3), np.float32)
        tensors[codec.PREFIX + name + codec.WEIGHT_B] = np.ones((5, r), np.float32)
    config = {"r": 4, "lora_alpha": 16, "rank_pattern": {"up": 2}, "alpha_pattern": {"up": 8}}
    folded = codec.from_peft(config, tensors)
    assert folded["q"].product()[0, 0] == 16
    assert folded["up"].product()[0, 0] == 8
    folded = codec.from_peft(config | {"use_rslora": True}, tensors)
    assert folded["q"].product()[0, 0] == 32
    assert folded["up"].product()[0, 0] == pytest.approx(16 / 2**0.5)


def test_half_a_module_is_not_folded() -> None:
    half = {codec.PREFIX + "q" + codec.WEIGHT_A: np.ones((4, 3), np.float32)}
    with pytest.raises(AdapterError, match=r"tensor base_model\.model\.q\.lora_B\.weight is missing"):
        codec.from_peft({"lora_alpha": 16}, half)


def test_config_of_narrow_modules() -> None:
    config = codec.peft_config("tiny", {"a.q": (8, 8), "a.k": (2, 8)}, 4, 2.0)
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["rank_pattern"] == {"^a.k": 2}
    assert config["alpha_pattern"] == {"^a.k": 4}
    assert re.match(r"(.*\.)?(^a.k)$", "a.k")
    assert config["target_modules"] == ["a.k", "a.q"]


def test_sha256(path: Path) -> None:
    path.write_bytes(b"abc" * 100_000)
    assert codec.sha256_file(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


# --- files that came over the wire ------------------------------------------------------------------


@given(adapters(), st.sampled_from(WIRE_DTYPES), st.data())
def test_a_file_cut_short_or_with_more_behind_it_is_noticed(
    path: Path, drawn: tuple[dict[str, LoraFactors], int], dtype: WireDtype, data: st.DataObject
) -> None:
    content = codec.encode(drawn[0], 1.0, dtype)
    path.write_bytes(content)
    codec.require_length(path)
    codec.require_whole(path)
    kept = data.draw(st.integers(0, len(content) - 1))
    for damaged in (content[:kept], content + content[:kept] + b"x"):
        path.write_bytes(damaged)
        with pytest.raises((AdapterError, TooLarge)):
            codec.require_length(path)


@given(adapters(), st.binary(max_size=200), st.data())
def test_whatever_lies_there_is_an_adapter_or_an_error_by_name(
    path: Path, drawn: tuple[dict[str, LoraFactors], int], junk: bytes, data: st.DataObject
) -> None:
    content = codec.encode(drawn[0], 1.0)
    place = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:place] + junk + content[place + len(junk) :])
    try:
        codec.require_whole(path)
    except (AdapterError, TooLarge):
        return
    assert codec.open_own(path, 1.0).ranks


def test_numbers_that_are_none_are_noticed(path: Path) -> None:
    content = codec.encode(
        {"m.x": LoraFactors(np.ones((3, 1), np.float32), np.ones((1, 2), np.float32))}, 1.0
    )
    path.write_bytes(content[:-4] + np.float32(np.nan).tobytes())
    codec.require_length(path)
    with pytest.raises(AdapterError, match="m.x"):
        codec.require_whole(path)


def test_modules_of_rank_0_and_of_unequal_rank_are_whole(path: Path) -> None:
    made = {
        f"m.r{r}": LoraFactors(np.ones((3, r), np.float32), np.ones((r, 2), np.float32)) for r in (0, 1, 2)
    }
    path.write_bytes(codec.encode(made, 1.0))
    codec.require_whole(path)
