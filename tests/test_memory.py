"""The memory estimate: numbers by hand, laws, what real models keep, and one real process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edge_sdk.core.errors import InputError
from edge_sdk.core.facts import ModelFacts, facts_from_config
from edge_sdk.core.memory import (
    ACCELERATOR,
    CPU,
    CPU_BF16,
    Placement,
    RankChoice,
    choose_rank,
    estimate,
    human_bytes,
)
from edge_sdk.core.messages import Training

EXACT = Placement(compute_bytes=4, carried_bytes=4, heap_spread=0.0)
LADDER = (1, 2, 4, 8, 16)

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


def test_the_estimate_by_hand() -> None:
    found = estimate(FACTS, rank=2, carry_rank=4, micro_batch=8, sequence_len=96, placement=EXACT)
    tokens = 8 * 96
    assert found.linear_weights == round(4_718_592 * (0.5 + 1 / 64 + 1 / 4096))
    assert found.other_weights == 4 * 1_051_904
    assert found.trained_factors == 16 * 2 * 6 * 4864
    assert found.carried_factors == 4 * 4 * 6 * 4864
    # per block: 2 norms, 4 LoRA inputs, q, k, v, 3 of the MLP, 7 ranks, 4 + 2 scalars
    block = 2 * 256 + (256 + 256 + 256 + 768) + (256 + 128 + 128) + 3 * 768 + 7 * 2 + 6
    assert found.activations == tokens * 4 * 6 * block
    assert found.logits == tokens * 4096 * 12
    assert found.workspace == 768 * 256 * 4
    assert found.heap == 0
    assert found.peak_bytes == 136_599_680
    assert ACCELERATOR.heap_spread == 0.0


def test_placement() -> None:
    full, half = estimate(FACTS, 8, 8, 4, 64, EXACT), estimate(FACTS, 8, 8, 4, 64, ACCELERATOR)
    assert full.linear_weights == half.linear_weights
    assert full.trained_factors == half.trained_factors
    assert full.other_weights == 2 * half.other_weights
    assert full.carried_factors == 2 * half.carried_factors
    assert half.logits == full.logits == 4 * 64 * 4096 * 12
    spread = estimate(FACTS, 8, 8, 4, 64, CPU)
    allocated = full.activations + full.logits + full.workspace
    assert spread.heap == round(CPU.heap_spread * allocated)
    assert estimate(FACTS, 8, 8, 4, 64, CPU_BF16).peak_bytes < spread.peak_bytes


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
placements = st.sampled_from([EXACT, CPU, CPU_BF16, ACCELERATOR])
sizes = st.integers(1, 16)


@given(facts_drawn, sizes, sizes, sizes, sizes, placements)
def test_the_peak_grows_with_every_size(
    facts: ModelFacts, rank: int, carry: int, batch: int, length: int, placement: Placement
) -> None:
    peak = estimate(facts, rank, carry, batch, length, placement).peak_bytes
    assert estimate(facts, rank + 1, carry, batch, length, placement).peak_bytes >= peak
    assert estimate(facts, rank, carry + 1, batch, length, placement).peak_bytes >= peak
    assert estimate(facts, rank, carry, batch + 1, length, placement).peak_bytes > peak
    assert estimate(facts, rank, carry, batch, length + 1, placement).peak_bytes > peak


def choose(facts: ModelFacts, batch: int, budget: int, placement: Placement) -> RankChoice | None:
    try:
        return choose_rank(facts, Training(batch=batch, sequence_len=32), LADDER, 4, budget, placement)
    except InputError:
        return None


@given(facts_drawn, sizes, st.integers(0, 10**11), st.integers(0, 10**11), placements)
def test_the_choice_grows_with_the_budget_and_keeps_to_it(
    facts: ModelFacts, batch: int, budget: int, more: int, placement: Placement
) -> None:
    small, large = choose(facts, batch, budget, placement), choose(facts, batch, budget + more, placement)
    if small is None:
        cheapest = estimate(facts, 1, 4, 1, 32, placement).peak_bytes
        assert cheapest > budget
        return
    assert large is not None
    assert (large.micro_batch, large.rank) >= (small.micro_batch, small.rank)
    peak = estimate(facts, small.rank, 4, small.micro_batch, 32, placement).peak_bytes
    assert peak <= budget
    assert [candidate.rank for candidate in small.candidates] == list(LADDER)
    for candidate in small.candidates:
        assert candidate.fits == (candidate.rank <= small.rank) == (not candidate.why_not)
        assert candidate.upload_bytes == 4 * facts.adapter_values(candidate.rank)


@given(facts_drawn, sizes, placements)
def test_at_exactly_the_peak_it_fits_and_one_byte_below_it_does_not(
    facts: ModelFacts, batch: int, placement: Placement
) -> None:
    peak = estimate(facts, 8, 4, batch, 32, placement).peak_bytes
    assume(estimate(facts, 16, 4, batch, 32, placement).peak_bytes > peak)
    fits, below = choose(facts, batch, peak, placement), choose(facts, batch, peak - 1, placement)
    assert fits is not None
    assert (fits.rank, fits.micro_batch) == (8, batch)
    assert below is None or (below.micro_batch, below.rank) < (batch, 8)


# --- the choice, by example ----------------------------------------------------------------------


def test_a_choice_explains_itself() -> None:
    training = Training(batch=8, sequence_len=96)
    choice = choose_rank(FACTS, training, (2, 16, 64), 0, 150_000_000, EXACT)
    assert (choice.rank, choice.micro_batch) == (16, 8)
    assert choice.reason == "rank 16 needs 144 MB of 150 MB; rank 64 needs 173 MB, 23 MB over the budget"
    top = choose_rank(FACTS, training, (16, 2), 0, 10**9, EXACT)
    assert top.reason == "rank 16 needs 144 MB of 1.0 GB; it is the top of the ladder"


def test_a_small_budget_shrinks_the_micro_batch_before_it_declines() -> None:
    training = Training(batch=8, sequence_len=96)
    choice = choose_rank(FACTS, training, (2, 16), 0, 60_000_000, EXACT)
    assert (choice.rank, choice.micro_batch) == (16, 2)
    assert choice.reason.endswith("the batch of 8 runs 2 at a time, because none fits all at once")
    with pytest.raises(InputError) as caught:
        choose_rank(FACTS, training, (2, 16), 0, 20_000_000, EXACT)
    assert str(caught.value).startswith(
        "not enough memory to train: rank 2 with one example of 96 tokens at a time needs 24 MB, "
        "the budget is 20 MB; close other programs"
    )


@pytest.mark.parametrize(
    ("ladder", "message"),
    [
        (
            (2, 300),
            r"rank 300 on the ladder is larger than any module: .*q_proj is 256 × 256, so at most 256",
        ),
        ((), "the ladder of ranks is empty"),
        ((0, 2), "rank 0 on the ladder is below 1"),
    ],
)
def test_impossible_ladders(ladder: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_rank(FACTS, Training(), ladder, 0, 10**12)
    assert choose_rank(FACTS, Training(), (256,), 0, 10**12).rank == 256  # k and v are narrower; q is not


def test_no_target_modules() -> None:
    with pytest.raises(InputError, match="no target modules"):
        choose_rank(replace(FACTS, shapes={}), Training(), (2,), 0, 10**12)


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


def saved_bytes(model: Any, batch: int, length: int) -> tuple[int, int]:
    """Bytes that autograd keeps for the backward pass: of other widths than the vocabulary's, and of that."""
    import torch

    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[Any, int]] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    vocab = model.config.vocab_size
    ids = torch.arange(batch * length).reshape(batch, length) % vocab
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
    wide = sum(size for tensor, size in kept.values() if tensor.shape[-1:] == (vocab,))
    return sum(size for _, size in kept.values()) - wide, wide


def real_model(kind: str) -> Any:
    """A small model of a real architecture with LoRA of rank 4 on every linear layer of its blocks."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(1)
    special = {"bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        gpt2 = transformers.GPT2Config(**GPT2, **special, loss_type="ForCausalLM")
        model, targets = transformers.GPT2LMHeadModel(gpt2), ["c_attn", "c_proj", "c_fc"]
    else:
        sizes = {
            **LLAMA,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "vocab_size": 512,
        }
        name = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}[kind]
        model = getattr(transformers, f"{name}ForCausalLM")(
            getattr(transformers, f"{name}Config")(**sizes, **special)
        )
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2")
    return get_peft_model(model.eval(), lora)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2"])
def test_activations_are_what_autograd_keeps(kind: str) -> None:
    model = real_model(kind)
    shapes = {
        name: (module.lora_B["default"].out_features, module.lora_A["default"].in_features)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    facts = facts_from_config(model.config.to_dict(), shapes)
    kept, wide = saved_bytes(model, 4, 48)
    found = estimate(facts, 4, 0, 4, 48, EXACT)
    assert kept == pytest.approx(found.activations, rel=0.005)
    assert wide <= found.logits

    base = model.get_base_model()
    parameters = sum(p.numel() for name, p in base.named_parameters() if "lora_" not in name)
    assert facts.linear_parameters + facts.other_parameters == pytest.approx(parameters, rel=0.02)


GROWTH = """
import gc, sys
import torch
torch.set_num_threads(1)
from edge_sdk import base_model
from edge_sdk.dataset import Tokenised
from edge_sdk.trainer import Plan, Start, Trainer

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def train(steps, batch, length):
    loaded = base_model.load("tiny", device="cpu", dtype="float32")
    trainer = Trainer(loaded, base_model.describe("tiny").modules, 2.0, progress=False)
    tokens = [tuple((7 * row + 3 * place) % 4000 + 5 for place in range(length)) for row in range(2 * batch)]
    plan = Plan(steps, batch, batch, length, 1e-3)
    rows = [Tokenised(ids=ids, labels=ids) for ids in tokens]
    trainer.train(Start(None, None, int(sys.argv[1]), 0), rows, plan, on_step=lambda report: "continue")

train(1, 1, 8)  # first calls import and allocate what stays
gc.collect()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
train(4, 8, 96)
print(status("VmHWM") - before)
"""


def grown(rank: int, **environment: str) -> int:
    """Growth of the peak resident set of a process that trains the `tiny` base on 8 × 96 tokens."""
    command = [sys.executable, "-W", "ignore", "-c", GROWTH, str(rank)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True, env=variables)
    return int(run.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("rank", [2, 16])
def test_a_real_process_allocates_as_predicted(rank: int) -> None:
    measured = grown(rank, MALLOC_MMAP_THRESHOLD_="65536")  # freed blocks go back at once
    assert measured == pytest.approx(estimate(FACTS, rank, 0, 8, 96, EXACT).peak_bytes, rel=0.15)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_process_stays_within_the_bound_for_a_fragmented_heap() -> None:
    assert grown(2) <= estimate(FACTS, 2, 0, 8, 96, CPU).peak_bytes
