"""The memory estimate: numbers by hand, laws, what real models keep, and one real process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core.choice import memory
from edge_sdk.core.choice.carried import CarriedDtype
from edge_sdk.core.choice.memory import ACCELERATOR, CPU, LOSS_CHUNK_VALUES, Placement, estimate, human_bytes
from edge_sdk.core.choice.model_facts import ModelFacts, facts_from_config
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.errors import InputError

EXACT = Placement(compute_bytes=4, heap_spread=0.0)

LLAMA: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
GPT2: dict[str, Any] = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}


def llama_shapes(layers: int = 6) -> dict[str, tuple[int, int]]:
    block = {
        "self_attn.q_proj": (256, 256),
        "self_attn.k_proj": (128, 256),
        "self_attn.v_proj": (128, 256),
        "self_attn.o_proj": (256, 256),
        "mlp.gate_proj": (768, 256),
        "mlp.up_proj": (768, 256),
        "mlp.down_proj": (256, 768),
    }
    return {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in block.items()}


FACTS = facts_from_config(LLAMA, llama_shapes())


def test_facts_by_hand() -> None:
    assert FACTS.linear_parameters == 6 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 768)
    assert FACTS.other_parameters == 4096 * 256 + 13 * 256
    assert facts_from_config({**LLAMA, "tie_word_embeddings": False}, {}).other_parameters == (
        2 * 4096 * 256 + 13 * 256
    )
    assert (FACTS.query_width, FACTS.key_value_width) == (256, 128)
    # 2 · (256 + 256) + 2 · (128 + 256) + 2 · (768 + 256) + (256 + 768) per block and unit of rank
    assert FACTS.adapter_values(2) == 2 * 6 * 4864
    assert FACTS.adapter_values(200) == 6 * (200 * (4864 - 2 * 384) + 128 * 2 * 384)  # k and v end at 128
    assert facts_from_config({**LLAMA, "head_dim": 32}, {}).query_width == 128


def setting(rank: int, micro_batch: int = 8, sequence_len: int = 96, **more: Any) -> Setting:
    return Setting(Ranks.uniform(rank), more.pop("carry_rank", 0), sequence_len, micro_batch, **more)


def test_facts_of_unequal_ranks() -> None:
    attention, mlp = 6 * (2 * (256 + 256) + 2 * (128 + 256)), 6 * 3 * (768 + 256)
    assert FACTS.adapter_values(Ranks(3, 5)) == 3 * attention + 5 * mlp
    assert FACTS.adapter_values(Ranks.uniform(2)) == FACTS.adapter_values(2)
    assert FACTS.adapter_values(0) == 0
    assert FACTS.largest_rank() == ("model.layers.0.self_attn.q_proj", 256)


# Per block and token: 2 norms; what the four kinds of A read; q, k, v; 3 of the MLP; 7 modules of rank 2; an
# attention sum per head and a scale per norm.
BLOCK = 2 * 256 + (256 + 256 + 256 + 768) + (256 + 128 + 128) + 3 * 768 + 7 * 2 + (4 + 2)
TOKENS = 8 * 96


def test_the_estimate_by_hand() -> None:
    found = estimate(FACTS, setting(2, carry_rank=4), EXACT)
    assert found.framework == found.heap == 0
    assert found.linear_weights == round(4_718_592 * (0.5 + 1 / 64 + 1 / 4096))
    assert found.other_weights == 4 * 1_051_904
    assert found.factors == found.gradients == 4 * 2 * 6 * 4864
    assert found.moments == 2 * found.factors
    assert found.carried == 4 * 4 * 6 * 4864
    assert found.activations == TOKENS * 4 * 6 * BLOCK
    assert found.logits == TOKENS * 4096 * 4 + 2 * 4 * LOSS_CHUNK_VALUES
    assert found.backward == 4 * (TOKENS * (3 * 768 + 2 * 256) + 768 * 256)
    # The loss is the highest moment: 3 MB of weights, 4 MB of embeddings, 90 MB of activations, 21 of logits.
    assert found.logits > found.backward
    assert found.moving_bytes == found.activations + found.logits
    assert found.peak_bytes == 2_434_176 + 4_207_616 + 5 * 233_472 + found.moving_bytes
    assert sum(found.terms().values()) == found.peak_bytes + found.backward + found.gradients


def test_recomputed_activations_by_hand() -> None:
    kept, again = (estimate(FACTS, setting(2, checkpointing=on), EXACT) for on in (False, True))
    assert again.activations == TOKENS * 4 * (6 * 256 + 256)  # inputs of six blocks, and of the last norm
    assert again.backward == kept.backward + TOKENS * 4 * BLOCK  # of one block at a time
    assert again.moving_bytes == again.activations + again.backward


def test_the_end_of_the_backward_pass_is_the_peak_of_short_texts_at_high_ranks() -> None:
    found = estimate(FACTS, setting(256, 1, 1), EXACT)
    assert found.gradients > found.activations + found.logits
    assert found.moving_bytes == found.gradients + found.backward


def test_bfloat16_by_hand() -> None:
    half = estimate(FACTS, setting(2, carry_rank=4), ACCELERATOR)
    # Norms compute on float32 copies, sums and scales are float32, and float32 factors are cast.
    values, float32 = BLOCK - 2 * 256 - 6, 2 * 256 + 6
    casts = 2 * (2 + 4) * 6 * 4864
    assert half.activations == TOKENS * 6 * (2 * values + 4 * float32) + casts
    assert half.logits == TOKENS * 4096 * 2 + 2 * 4 * LOSS_CHUNK_VALUES
    packed = estimate(FACTS, setting(2, carry_rank=4, carried_dtype="int8"), ACCELERATOR)
    assert packed.activations == half.activations - 2 * 4 * 6 * 4864
    assert packed.carried == round(1.0625 * 4 * 6 * 4864)
    full = estimate(FACTS, setting(2, carry_rank=4), EXACT)
    assert (half.factors, half.moments, half.carried) == (full.factors, full.moments, full.carried)
    assert half.linear_weights == full.linear_weights
    assert full.other_weights == 2 * half.other_weights


def test_placement() -> None:
    plain, spread = estimate(FACTS, setting(8), EXACT), estimate(FACTS, setting(8), CPU)
    share = memory.HEAP_SPREAD + 6 * memory.HEAP_SPREAD_PER_BLOCK
    fixed = memory.KERNEL_BYTES + memory.TRAINED_SPREAD * (plain.factors + plain.moments)
    assert spread.heap == round(fixed + share * plain.moving_bytes)
    again = setting(8, checkpointing=True)
    tight = fixed + memory.TIGHT_HEAP_SPREAD * estimate(FACTS, again, EXACT).moving_bytes
    assert estimate(FACTS, again, CPU).heap == round(tight)
    assert spread.peak_bytes == plain.peak_bytes + spread.heap
    assert ACCELERATOR.heap_spread == 0.0
    unquantised = estimate(FACTS, setting(8), replace(EXACT, weight_bytes=2, framework_bytes=1000))
    assert unquantised.linear_weights == 2 * 4_718_592
    assert unquantised.framework == 1000
    assert unquantised.peak_bytes == plain.peak_bytes - plain.linear_weights + 2 * 4_718_592 + 1000


def test_the_chunk_of_the_loss_is_the_one_that_the_loss_uses() -> None:
    from edge_sdk.training.loss import CHUNK_VALUES

    assert LOSS_CHUNK_VALUES == CHUNK_VALUES


# --- laws ----------------------------------------------------------------------------------------

facts_drawn = st.builds(
    facts_from_config,
    st.fixed_dictionaries(
        {
            "vocab_size": st.integers(1, 10**5),
            "hidden_size": st.integers(8, 4096),
            "intermediate_size": st.integers(8, 10**4),
            "num_hidden_layers": st.integers(1, 40),
            "num_attention_heads": st.integers(1, 8),
        }
    ),
    st.dictionaries(
        st.text("abc.", min_size=1), st.tuples(st.integers(16, 500), st.integers(16, 500)), min_size=1
    ),
)
placements = st.sampled_from([EXACT, CPU, ACCELERATOR, replace(CPU, compute_bytes=2, weight_bytes=2)])
sizes = st.integers(1, 64)
settings = st.builds(
    Setting,
    st.builds(Ranks, sizes, sizes),
    st.integers(0, 64),
    sizes,
    sizes,
    st.booleans(),
    st.sampled_from(["adamw", "adamw8bit"]),
    st.sampled_from(["float32", "bfloat16", "int8", "nf4"]),
)


@given(facts_drawn, settings, placements)
def test_the_peak_grows_with_every_size(facts: ModelFacts, at: Setting, placement: Placement) -> None:
    def peak(**changes: Any) -> int:
        return estimate(facts, replace(at, **changes), placement).peak_bytes

    ranks = at.ranks
    assert peak(ranks=replace(ranks, attention=ranks.attention + 1)) >= peak()
    assert peak(ranks=replace(ranks, mlp=ranks.mlp + 1)) >= peak()
    assert peak(carry_rank=at.carry_rank + 1) >= peak()
    assert peak(micro_batch=at.micro_batch + 1) > peak()
    assert peak(sequence_len=at.sequence_len + 1) > peak()


@given(facts_drawn, settings, placements)
def test_what_saves_memory_never_costs_any(facts: ModelFacts, at: Setting, placement: Placement) -> None:
    def of(**changes: Any) -> Any:
        return estimate(facts, replace(at, **changes), placement)

    assert of(checkpointing=True).activations <= of(checkpointing=False).activations
    assert of(optimizer="adamw8bit").peak_bytes <= of(optimizer="adamw").peak_bytes
    held = [of(carried_dtype=dtype).peak_bytes for dtype in ("nf4", "int8", "bfloat16", "float32")]
    assert held == sorted(held)


@given(facts_drawn, settings, placements)
def test_the_peak_is_no_more_than_all_terms_at_once(
    facts: ModelFacts, at: Setting, placement: Placement
) -> None:
    found = estimate(facts, at, placement)
    assert min(found.terms().values()) >= 0
    assert found.heap + found.moving_bytes < found.peak_bytes <= sum(found.terms().values())


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LLAMA, {"hidden_size": None}, "hidden_size is missing"),
        (LLAMA, {"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, got True"),
        (LLAMA, {"intermediate_size": "many"}, "intermediate_size must be a positive integer, got 'many'"),
        (LLAMA, {"num_local_experts": 8}, "num_local_experts is set; mixture-of-experts"),
        (GPT2, {"n_layer": None}, "n_layer is missing"),
        (GPT2, {"n_positions": None}, "n_positions is missing"),
    ],
)
def test_a_config_that_says_too_little(config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"config.json: {message}"):
        facts_from_config({**config, **change}, {})


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (912, "912 B"),
        (1500, "2 kB"),
        (412_300_000, "412 MB"),
        (6_900_000_000, "6.9 GB"),
        (9_960_000, "10 MB"),
        (999_600_000, "1.0 GB"),
        (16_000_000_000, "16 GB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


# --- against real models -------------------------------------------------------------------------

KINDS = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
BATCH, LENGTH, VOCAB = 3, 40, 300


def build(kind: str, directory: Path) -> Path:
    """A model of three narrow blocks with random weights."""
    import torch
    import transformers

    from tests.models import build_tokenizer

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB}
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "head_dim": 16}
    values = GPT2 | {"n_layer": 3} if kind == "gpt2" else LLAMA | sizes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **(values | special))
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    build_tokenizer(None).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return {kind: build(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@contextmanager
def counting(weights: set[int]) -> Iterator[dict[int, int]]:
    """Address -> bytes of all that autograd keeps, but for what is there anyway."""
    import torch

    kept: dict[int, int] = {}
    alive = []  # or an address would be used twice

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def kept_bytes(trainer: Any, at: Setting) -> int:
    """What one forward pass of a training at this setting keeps; the loss keeps its logits itself."""
    from edge_sdk.text.rows import Tokenised
    from edge_sdk.training.adapter_places import CARRIED, LOCAL
    from edge_sdk.training.plan import Start
    from edge_sdk.training.recompute import recomputed

    model = trainer.base.model
    adapters = {LOCAL: trainer.starting_factors(Start(None, None, at.ranks, 0))}
    if at.carry_rank:
        adapters[CARRIED] = trainer.starting_factors(Start(None, None, at.carry_rank, 1))
    ids = [tuple((7 * r + 3 * p) % 290 + 5 for p in range(at.sequence_len)) for r in range(at.micro_batch)]
    with trainer.places.installed(adapters, at.carried_dtype), recomputed(model, at.checkpointing):
        there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        with counting(there) as kept:
            loss = trainer.loss_sum([Tokenised(ids=row, labels=row) for row in ids])
        loss.backward()
    return sum(kept.values())


def cases() -> Iterator[Setting]:
    yield Setting(Ranks.uniform(4), 0, LENGTH, BATCH)
    yield Setting(Ranks.uniform(4), 0, LENGTH, BATCH, checkpointing=True)
    yield Setting(Ranks(attention=3, mlp=100), 0, LENGTH, BATCH)
    held: tuple[CarriedDtype, ...] = ("float32", "int8", "nf4")
    for dtype in held:
        yield Setting(Ranks.uniform(4), 8, LENGTH, BATCH, carried_dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_what_autograd_keeps(directories: Mapping[str, Path], kind: str, dtype: Any) -> None:
    from edge_sdk.model import base_model, files
    from edge_sdk.training.trainer import Trainer

    directory = directories[kind]
    base = base_model.load(str(directory), device="cpu", quantise=False, dtype=dtype)
    modules = base_model.describe(str(directory)).modules
    facts = facts_from_config(files.read_config(directory), modules)
    parameters = sum(p.numel() for p in base.model.parameters())
    assert facts.linear_parameters + facts.other_parameters == pytest.approx(parameters, rel=0.02)
    trainer = Trainer(base, modules, 2.0, progress=False)
    place = Placement(compute_bytes=4 if dtype == "float32" else 2, heap_spread=0.0)
    # Left out of the estimate: cosines and sines of the positions, which examples share, and some indices.
    # Recomputing leaves little beside these.
    for at in cases():
        found = estimate(facts, at, place).activations
        assert kept_bytes(trainer, at) == pytest.approx(found, rel=0.02 if at.checkpointing else 0.005), at


GROWTH = """
import sys
from edge_sdk.model import base_model
from edge_sdk.system import process_memory
from edge_sdk.text.rows import Tokenised
from edge_sdk.training.plan import Plan, Start
from edge_sdk.training.trainer import Trainer

base_model.use_threads(1)

def train(steps, batch, length):
    loaded = base_model.load("tiny", device="cpu", dtype="float32")
    trainer = Trainer(loaded, base_model.describe("tiny").modules, 2.0, progress=False)
    tokens = [tuple((7 * row + 3 * place) % 4000 + 5 for place in range(length)) for row in range(2 * batch)]
    plan = Plan(steps, batch, batch, length, 1e-3)
    rows = [Tokenised(ids=ids, labels=ids) for ids in tokens]
    trainer.train(Start(None, None, int(sys.argv[1]), 0), rows, plan, on_step=lambda report: "continue")

train(2, 1, 128)  # first calls import and allocate what stays
base_model.release_memory()
before = process_memory.resident_bytes()
process_memory.reset_peak()
train(3, 8, 96)
print(process_memory.peak_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_process_grows_as_predicted() -> None:
    """What is allocated, seen from outside: freed blocks go back at once, so that no heap spreads."""
    command = [sys.executable, "-W", "ignore", "-c", GROWTH, "16"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True, env=variables)
    measured = int(run.stdout.splitlines()[-1])
    assert measured == pytest.approx(estimate(FACTS, setting(16), EXACT).peak_bytes, rel=0.1)
