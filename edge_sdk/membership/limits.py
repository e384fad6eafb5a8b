"""What a federation asks of a device, held against what its owner allows, before anything is fetched."""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import InputError, Unreachable
from edge_sdk.core.messages import Assignment, Federation
from edge_sdk.options import Limits

FINGERPRINT_DIGITS = 12  # of a fingerprint, the fewest that name a base


@dataclass(frozen=True)
class Demand:
    """One thing that a federation asks for, in words; `wrong`: how it is beyond the owner's limit, if so."""

    what: str
    asked: str
    limit: str
    wrong: str = ""


def demands(federation: Federation, limits: Limits) -> tuple[Demand, ...]:
    """Everything that the owner's limits are about."""
    base, training = federation.base, federation.training
    tokens = training.steps * training.batch * training.sequence_len
    examples, down_bytes = training.steps * training.batch, download_bytes(federation)
    allowed = " or ".join(limits.bases) or "any"
    return (
        Demand("base", base.model, allowed, "" if _allows(limits, federation) else "it is not one of them"),
        Demand(
            "tokens of an assignment",
            f"{training.steps} steps × {training.batch} examples × {training.sequence_len} tokens = {tokens}",
            f"at most {limits.most_tokens}",
            "" if tokens <= limits.most_tokens else "it is more",
        ),
        Demand(
            "bytes of a download",
            str(down_bytes),
            f"at most {limits.most_download_bytes}",
            "" if down_bytes <= limits.most_download_bytes else "it is more",
        ),
        Demand(
            "examples behind an update",
            f"{training.steps} steps × {training.batch} examples = {examples}",
            f"at least {limits.least_examples}",
            "" if examples >= limits.least_examples else "it is fewer",
        ),
    )


def require(federation: Federation, limits: Limits) -> None:
    """Raise InputError for a federation that asks for more than the owner allows; names the first such."""
    for it in demands(federation, limits):
        if it.wrong:
            raise InputError(
                f"federation {federation.id} is beyond this device's limits: {it.what}: {it.asked}, "
                f"allowed is {it.limit}; {it.wrong}"
            )


def require_assignment(work: Assignment, federation: Federation, limits: Limits) -> None:
    """Raise Unreachable for work that the federation does not give, or that tells too much of each record."""
    training, ranks = federation.training, (*federation.ladder, *map(max, federation.mixed_ranks))
    least = least_steps(federation, limits)
    if not least <= work.steps <= training.steps:
        raise Unreachable(
            f"an assignment of {work.steps} steps is refused: {least} to {training.steps} it must be"
        )
    if work.rank > max(ranks, default=0) or work.carry_rank > federation.rank_cap:
        raise Unreachable(
            f"an assignment of rank {work.rank}, carrying {work.carry_rank}, is refused: the federation's "
            f"end at {max(ranks, default=0)} and {federation.rank_cap}"
        )


def least_steps(federation: Federation, limits: Limits) -> int:
    """Steps without which nothing is handed in: fewer would say too much of single records."""
    return -(-limits.least_examples // federation.training.batch)


def download_bytes(federation: Federation) -> int:
    """The largest adapter file that a device of this federation fetches."""
    rank = federation.rank_cap if federation.carries else max(federation.ladder, default=1)
    return codec.max_adapter_bytes(federation.base.modules, rank, federation.download_dtype)


def upload_bytes(federation: Federation, rank: int) -> int:
    """The largest adapter file that it hands in at a rank."""
    return codec.max_adapter_bytes(federation.base.modules, rank, federation.upload_dtype)


def _allows(limits: Limits, federation: Federation) -> bool:
    base = federation.base
    return not limits.bases or any(
        name == base.model or (len(name) >= FINGERPRINT_DIGITS and base.fingerprint.startswith(name))
        for name in limits.bases
    )
