"""Peak memory of local training, as named terms, from a model's configuration alone.

The terms are what autograd keeps for a decoder-only transformer whose linear layers are NF4 and whose
trainable part is LoRA. `python -m benchmarks.memory_model` compares them with real trainings, and a test
counts the tensors that real models save. Assumed: attention through PyTorch's fused kernels (no score
matrix), no dropout, every row as long as the sequence length allows (the worst case), and the loss of
`edge_sdk.training.loss`, which holds the logits once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from edge_sdk.core.choice.carried import BYTES_PER_VALUE
from edge_sdk.core.choice.model_facts import ModelFacts, facts_from_config
from edge_sdk.core.choice.setting import Optimizer, Setting

__all__ = [
    "ACCELERATOR",
    "CPU",
    "Estimate",
    "ModelFacts",
    "Placement",
    "estimate",
    "facts_from_config",
    "human_bytes",
]

# NF4 with double quantisation (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3): 4 bits, one 8-bit
# absmax per 64 parameters, one fp32 constant per 256 of those absmax values.
NF4_BYTES = 4 / 8 + 1 / 64 + 4 / (64 * 256)

FACTOR_BYTES = 4  # trained factors and their gradients are fp32

# Two moments of Adam: fp32; or 8 bits with an fp32 absmax per 256 values each.
MOMENT_BYTES: dict[Optimizer, float] = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256)}

# The loss turns this many logits at a time into float32 log-probabilities, while the last chunk is still
# there: `edge_sdk.training.loss.CHUNK_VALUES`, which a test compares.
LOSS_CHUNK_VALUES = 1 << 20
LOSS_CHUNKS = 2

# glibc's heap holds more than was allocated, because freed tensors leave holes between those that live until
# the backward pass: a share of what comes and goes in a step, which grows with the number of blocks, since
# each leaves holes of its own. Recomputation runs on a tight heap (`edge_sdk.training.recompute`). Fitted to
# the grid of `benchmarks.memory_model`, as is what oneDNN keeps of kernels and scratch for the shapes it has
# met; docs/MEMORY.md has the residuals.
HEAP_SPREAD, HEAP_SPREAD_PER_BLOCK, MOST_BLOCKS = 0.30, 0.025, 32
TIGHT_HEAP_SPREAD = 0.20
TRAINED_SPREAD = 0.20  # of factors and moments, which are updated one after the other
KERNEL_BYTES = 40_000_000


@dataclass(frozen=True)
class Placement:
    """Where and how training computes. `compute_bytes`: 4 for float32, 2 for bfloat16."""

    compute_bytes: int
    heap_spread: float  # times what was measured with glibc; 0 where the allocator does not fragment
    weight_bytes: float = NF4_BYTES  # per parameter of the linear layers; `compute_bytes` if not quantised
    framework_bytes: int = 0  # a process that has trained a model of no size; measured, never assumed


CPU = Placement(compute_bytes=4, heap_spread=1.0)
ACCELERATOR = Placement(compute_bytes=2, heap_spread=0.0)


@dataclass(frozen=True)
class Estimate:
    """The terms, in bytes. Those of one step do not all coincide: see `peak_bytes`."""

    framework: int
    linear_weights: int
    other_weights: int  # embeddings, norms, a head of its own
    factors: int
    moments: int  # of the optimiser
    carried: int
    activations: int  # kept for the backward pass
    logits: int
    backward: int  # of one block: gradients of activations, dequantised weights, what was recomputed
    gradients: int  # of the factors
    heap: int

    @property
    def peak_bytes(self) -> int:
        """The highest of three moments, on top of what stays: the loss, the first block of the backward pass,
        and its end, when the activations are gone and all gradients there.
        """
        stays = self.framework + self.linear_weights + self.other_weights
        stays += self.factors + self.moments + self.carried
        return stays + self.moving_bytes + self.heap

    @property
    def moving_bytes(self) -> int:
        """What comes and goes in a step, at its highest."""
        start = self.activations + max(self.logits, self.backward)
        return max(start, self.gradients + self.backward)

    def beside_peak(self) -> tuple[str, ...]:
        """Names of the terms that are not there at the highest moment."""
        if self.gradients + self.backward > self.activations + max(self.logits, self.backward):
            return ("activations", "logits")
        return ("gradients", "backward" if self.logits >= self.backward else "logits")

    def terms(self) -> dict[str, int]:
        """Name -> bytes, for people."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def estimate(facts: ModelFacts, setting: Setting, placement: Placement = CPU) -> Estimate:
    """Predict the peak of training in this way, in this place."""
    tokens = setting.micro_batch * setting.sequence_len
    trained = facts.adapter_values(setting.ranks)
    carried = facts.adapter_values(setting.carry_rank)
    block = tokens * _block_bytes(facts, setting, placement.compute_bytes)
    block += _cast_bytes(facts, setting, placement.compute_bytes) // facts.layers
    kept = facts.layers * block
    if setting.checkpointing:
        inputs = facts.layers * facts.hidden * placement.compute_bytes
        kept = tokens * (inputs + _norm_bytes(facts, placement.compute_bytes))
    backward = _backward_bytes(facts, tokens, placement.compute_bytes)
    found = Estimate(
        framework=placement.framework_bytes,
        linear_weights=round(placement.weight_bytes * facts.linear_parameters),
        other_weights=placement.compute_bytes * facts.other_parameters,
        factors=FACTOR_BYTES * trained,
        moments=round(MOMENT_BYTES[setting.optimizer] * trained),
        carried=round(BYTES_PER_VALUE[setting.carried_dtype] * carried),
        activations=kept,
        logits=_logit_bytes(tokens * facts.vocab, placement.compute_bytes),
        backward=backward + (block if setting.checkpointing else 0),
        gradients=FACTOR_BYTES * trained,
        heap=0,
    )
    heap = round(placement.heap_spread * _heap_bytes(facts, setting, found))
    return Estimate(**{**found.terms(), "heap": heap})


def _heap_bytes(facts: ModelFacts, setting: Setting, found: Estimate) -> float:
    """What the process holds beyond its tensors; see HEAP_SPREAD."""
    spread = HEAP_SPREAD + HEAP_SPREAD_PER_BLOCK * min(facts.layers, MOST_BLOCKS)
    share = TIGHT_HEAP_SPREAD if setting.checkpointing else spread
    return KERNEL_BYTES + share * found.moving_bytes + TRAINED_SPREAD * (found.factors + found.moments)


def _logit_bytes(values: int, compute_bytes: int) -> int:
    """The logits, which become their own gradient, and float32 chunks of them."""
    return compute_bytes * values + LOSS_CHUNKS * 4 * min(values, LOSS_CHUNK_VALUES)


def _cast_bytes(facts: ModelFacts, setting: Setting, compute_bytes: int) -> int:
    """float32 factors are multiplied in the dtype of computation, and the backward pass keeps those copies.

    Packed ones are unpacked again instead.
    """
    if compute_bytes == FACTOR_BYTES:
        return 0
    copied = facts.adapter_values(setting.ranks)
    if setting.carried_dtype == "float32":
        copied += facts.adapter_values(setting.carry_rank)
    return compute_bytes * copied


def _norm_bytes(facts: ModelFacts, compute_bytes: int) -> int:
    """What the backward pass of a norm needs for one token: its input."""
    return facts.hidden * (4 if facts.norms_in_float32 else compute_bytes)


def _block_bytes(facts: ModelFacts, setting: Setting, compute_bytes: int) -> int:
    """Bytes that autograd keeps of one block for one token.

    The inputs of two norms (float32 copies where the norm computes in float32); what the LoRA `A` matrices
    read: normed hidden states twice, attention output, MLP product; query, key and value; the MLP between its
    linear layers; the r values between each trained `A` and `B` (frozen ones need none); an fp32 log-sum-exp
    per head and scale per norm.
    """
    attention = 2 * facts.query_width + 2 * facts.key_value_width
    mlp = (facts.mlp_tensors + 1) * facts.intermediate
    between = sum(min(setting.ranks.of(name), o, i) for name, (o, i) in facts.shapes.items()) // facts.layers
    heads_values = facts.query_width + facts.key_value_width
    normed_heads = heads_values * facts.heads // facts.query_width  # of queries and of keys
    head_norms = 4 * (heads_values + normed_heads) if facts.head_norms else 0
    scalars = 4 * (facts.heads + 2)
    values = 2 * facts.hidden + attention + mlp + between
    return compute_bytes * values + 2 * _norm_bytes(facts, compute_bytes) + head_norms + scalars


def _backward_bytes(facts: ModelFacts, tokens: int, compute_bytes: int) -> int:
    """Gradients inside one MLP, the widest part of a block, and the largest layer's weights dequantised."""
    widest = 3 * facts.intermediate + 2 * facts.hidden
    largest = max((o * i for o, i in facts.shapes.values()), default=0)
    return compute_bytes * (tokens * widest + largest)


def human_bytes(count: int) -> str:
    """A size for people, in decimal units: 912 B, 412 MB, 6.9 GB."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(size) < 999.5:
            break
        size, unit = size / 1000, larger
    whole = unit in ("B", "kB") or abs(size) >= 9.95
    return f"{size:.0f} {unit}" if whole else f"{size:.1f} {unit}"
