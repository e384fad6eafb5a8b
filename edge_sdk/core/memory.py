"""Peak memory of local training, as named terms, and the choice of the rank that fits.

The terms are what autograd keeps for a decoder-only transformer whose linear layers are NF4 and whose
trainable part is LoRA; a test counts the tensors that real models save and finds the same bytes. Assumed:
attention through PyTorch's fused kernels (no score matrix), no dropout, no gradient checkpointing, every
token a label (the worst case for the logits). Nothing is counted that a process with the frameworks
imported holds already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from edge_sdk.core.errors import InputError
from edge_sdk.core.facts import ModelFacts, facts_from_config
from edge_sdk.core.messages import Training

__all__ = [
    "ACCELERATOR",
    "CPU",
    "CPU_BF16",
    "Candidate",
    "Estimate",
    "ModelFacts",
    "Placement",
    "RankChoice",
    "choose_rank",
    "estimate",
    "facts_from_config",
    "human_bytes",
]

# NF4 with double quantisation (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3): 4 bits, one 8-bit
# absmax per 64 parameters, one fp32 constant per 256 of those absmax values.
NF4_BYTES = 4 / 8 + 1 / 64 + 4 / (64 * 256)

TRAINED_BYTES = 16  # fp32: the weight, its gradient, two moments of Adam
UPLOAD_BYTES = 4  # adapters travel as float32

# fp32, per token and vocabulary entry: forward, logits, those of the label positions and their
# log-probabilities; backward, the log-probabilities and two gradients.
LOGIT_BYTES = 12

# glibc serves blocks under 32 MB from a heap that grows around the tensors that live until the backward
# pass, so that a process holds more than it allocated. Growth of the peak resident set beyond the other
# terms, as a share of activations, logits and workspace, over ten trainings of the `tiny` base with glibc
# 2.36: 0.70 to 1.20. With MALLOC_MMAP_THRESHOLD_=65536 in the environment it is gone, for steps that take 1.2
# to 2 times as long.
GLIBC_HEAP_SPREAD = 1.25


@dataclass(frozen=True)
class Placement:
    """Where and how training computes. `compute_bytes`: 4 for float32, 2 for bfloat16 or float16."""

    compute_bytes: int
    carried_bytes: int  # per value of the frozen carried adapter
    heap_spread: float  # see GLIBC_HEAP_SPREAD; 0 where the allocator does not fragment
    weight_bytes: float = NF4_BYTES  # per parameter of the linear layers; `compute_bytes` if not quantised


CPU = Placement(compute_bytes=4, carried_bytes=4, heap_spread=GLIBC_HEAP_SPREAD)
CPU_BF16 = Placement(compute_bytes=2, carried_bytes=4, heap_spread=GLIBC_HEAP_SPREAD)
ACCELERATOR = Placement(compute_bytes=2, carried_bytes=2, heap_spread=0.0)


@dataclass(frozen=True)
class Estimate:
    """The peak, early in the backward pass, in bytes on top of a process with the frameworks loaded."""

    linear_weights: int
    other_weights: int
    trained_factors: int
    carried_factors: int
    activations: int
    logits: int
    workspace: int
    heap: int

    @property
    def peak_bytes(self) -> int:
        """The sum of the terms."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Candidate:
    """One rank of the ladder. `why_not` is empty where it fits."""

    rank: int
    peak_bytes: int
    upload_bytes: int
    fits: bool
    why_not: str


@dataclass(frozen=True)
class RankChoice:
    """What to train. A step's batch runs in pieces of `micro_batch`; candidates are for that size."""

    rank: int
    carry_rank: int
    micro_batch: int
    budget_bytes: int
    candidates: tuple[Candidate, ...]
    reason: str


def estimate(
    facts: ModelFacts,
    rank: int,
    carry_rank: int,
    micro_batch: int,
    sequence_len: int,
    placement: Placement = CPU,
) -> Estimate:
    """Predict the peak of training `rank`, with a frozen adapter of `carry_rank` (0: none) beside it."""
    tokens = micro_batch * sequence_len
    largest = max((o * i for o, i in facts.shapes.values()), default=0)
    activations = tokens * _bytes_per_token(facts, rank, placement.compute_bytes)
    logits = tokens * facts.vocab * LOGIT_BYTES
    workspace = largest * placement.compute_bytes  # one layer's weights, dequantised
    return Estimate(
        linear_weights=round(placement.weight_bytes * facts.linear_parameters),
        other_weights=placement.compute_bytes * facts.other_parameters,
        trained_factors=TRAINED_BYTES * facts.adapter_values(rank),
        carried_factors=placement.carried_bytes * facts.adapter_values(carry_rank),
        activations=activations,
        logits=logits,
        workspace=workspace,
        heap=round(placement.heap_spread * (activations + logits + workspace)),
    )


def _bytes_per_token(facts: ModelFacts, rank: int, compute_bytes: int) -> int:
    """Bytes that autograd keeps for one token.

    Per block: the inputs of two norms (the first block's first input needs no gradient, the final norm's
    does); the inputs of the LoRA `A` matrices (normed hidden states, twice, attention output, MLP product);
    query, key and value; the MLP between its linear layers; one fp32 log-sum-exp per head and scale per
    norm. Per target: the r values between `A` and `B`. At half precision norms keep fp32 copies of their
    inputs, PEFT one for each target, and attention its own output.
    """
    attention = facts.query_width + 2 * facts.key_value_width
    mlp = facts.mlp_tensors * facts.intermediate
    between = 4 * sum(min(rank, o, i) for o, i in facts.shapes.values())
    scalars = 4 * (facts.heads + 2) * facts.layers
    norms = 4 * 2 * facts.hidden
    if compute_bytes == 4:
        inputs = 4 * (2 * facts.hidden + facts.query_width + facts.intermediate) * facts.layers
    else:
        inputs = 4 * sum(i for _, i in facts.shapes.values())
        attention += facts.query_width
    block = norms + compute_bytes * (attention + mlp)
    return block * facts.layers + inputs + between + scalars


def choose_rank(
    facts: ModelFacts,
    training: Training,
    ladder: Sequence[int],
    carry_rank: int,
    budget_bytes: int,
    placement: Placement = CPU,
) -> RankChoice:
    """The largest rank of the ladder whose predicted peak fits `budget_bytes`.

    Where none fits with the whole batch at once, the micro-batch is halved (gradients accumulate, the result
    is the same and takes longer) until one does.

    Raises:
        InputError: an impossible ladder, or nothing fits; says what is needed and what would help.
    """
    _check_ladder(facts, ladder)
    micro_batch = training.batch
    while True:
        candidates = tuple(
            _candidate(facts, rank, carry_rank, micro_batch, (training.sequence_len, budget_bytes, placement))
            for rank in sorted(ladder)
        )
        fitting = [candidate for candidate in candidates if candidate.fits]
        if fitting:
            chosen = fitting[-1]
            reason = _reason(chosen, candidates, micro_batch, training.batch, budget_bytes)
            return RankChoice(chosen.rank, carry_rank, micro_batch, budget_bytes, candidates, reason)
        if micro_batch == 1:
            raise InputError(
                f"not enough memory to train: rank {candidates[0].rank} with one example of "
                f"{training.sequence_len} tokens at a time needs {human_bytes(candidates[0].peak_bytes)}, "
                f"the budget is {human_bytes(budget_bytes)}; close other programs, raise the budget, "
                "or ask the host for a shorter sequence_len or a smaller base model"
            )
        micro_batch //= 2


def _check_ladder(facts: ModelFacts, ladder: Sequence[int]) -> None:
    """Refuse an empty ladder, a rank below 1, and one that no module has room for."""
    if not ladder:
        raise InputError("the ladder of ranks is empty; give at least one rank")
    if min(ladder) < 1:
        raise InputError(f"rank {min(ladder)} on the ladder is below 1")
    if not facts.shapes:
        raise InputError("the base model has no target modules; name the linear layers that LoRA is to adapt")
    module, limit = facts.largest_rank()
    if max(ladder) > limit:
        out_features, in_features = facts.shapes[module]
        raise InputError(
            f"rank {max(ladder)} on the ladder is larger than any module: {module} is "
            f"{out_features} × {in_features}, so at most {limit}"
        )


def _candidate(
    facts: ModelFacts, rank: int, carry_rank: int, micro_batch: int, limits: tuple[int, int, Placement]
) -> Candidate:
    """Predict one rank and compare it with the budget."""
    sequence_len, budget_bytes, placement = limits
    peak = estimate(facts, rank, carry_rank, micro_batch, sequence_len, placement).peak_bytes
    fits = peak <= budget_bytes
    why_not = "" if fits else f"needs {human_bytes(peak)}, {human_bytes(peak - budget_bytes)} over the budget"
    return Candidate(rank, peak, UPLOAD_BYTES * facts.adapter_values(rank), fits, why_not)


def _reason(
    chosen: Candidate, candidates: Sequence[Candidate], micro_batch: int, batch: int, budget_bytes: int
) -> str:
    """One sentence on why this rank."""
    text = f"rank {chosen.rank} needs {human_bytes(chosen.peak_bytes)} of {human_bytes(budget_bytes)}"
    larger = [candidate for candidate in candidates if candidate.rank > chosen.rank]
    text += f"; rank {larger[0].rank} {larger[0].why_not}" if larger else "; it is the top of the ladder"
    if micro_batch < batch:
        text += f"; the batch of {batch} runs {micro_batch} at a time, because none fits all at once"
    return text


def human_bytes(count: int) -> str:
    """A size for people, in decimal units: 912 B, 412 MB, 6.9 GB."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(size) < 999.5:
            break
        size, unit = size / 1000, larger
    whole = unit in ("B", "kB") or abs(size) >= 9.95
    return f"{size:.0f} {unit}" if whole else f"{size:.1f} {unit}"
