"""How a device trains: all that decides its memory and time, and may be chosen to fit the machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from edge_sdk.core.choice.carried import CarriedDtype
from edge_sdk.core.errors import InputError
from edge_sdk.core.ranges import Rank, RankOrNone, Several

Optimizer = Literal["adamw", "adamw8bit"]
Kind = Literal["attention", "mlp"]

# A module belongs to attention if one part of its name says so: `self_attn.q_proj`, `attn.c_attn`,
# `attention.query_key_value`. Every other linear layer of a block is of its feed-forward part.
ATTENTION = re.compile(r"(^|[._])(attn|attention)([._]|$)")


@dataclass(frozen=True)
class Ranks:
    """The LoRA rank of each kind of module: equal, or unequal as in the paper's Type 3 (30 and 200).

    A device of unequal ranks takes part as one of rank `largest`: narrower modules are told by their shapes.
    """

    attention: Rank
    mlp: Rank

    def __post_init__(self) -> None:
        if min(self.attention, self.mlp) < 1:
            raise InputError(f"ranks {self} are impossible; train at least rank 1")

    @classmethod
    def uniform(cls, rank: int) -> Ranks:
        """The same rank everywhere."""
        return cls(rank, rank)

    @classmethod
    def parse(cls, text: str) -> Ranks:
        """Read `8`, or `attention=30,mlp=200`.

        Raises:
            InputError: neither of the two.
        """
        if text.isdecimal():
            return cls.uniform(int(text))
        found = re.fullmatch(r"attention=(\d+),mlp=(\d+)", text.replace(" ", ""))
        if not found:
            raise InputError(f"rank {text!r}: write a number, or attention=30,mlp=200")
        return cls(int(found[1]), int(found[2]))

    @property
    def largest(self) -> int:
        """The rank that the coordinator is told."""
        return max(self.attention, self.mlp)

    def of(self, module: str) -> int:
        """The rank of one target module, before the module's own limit min(out, in)."""
        return self.attention if kind_of(module) == "attention" else self.mlp

    def __str__(self) -> str:
        if self.attention == self.mlp:
            return str(self.mlp)
        return f"attention={self.attention},mlp={self.mlp}"


def kind_of(module: str) -> Kind:
    """The kind of a linear layer, from its name."""
    return "attention" if ATTENTION.search(module) else "mlp"


@dataclass(frozen=True)
class Setting:
    """One way to train an assignment on one device.

    `micro_batch` examples are computed at a time, and their gradients add up to the step's batch.
    `checkpointing` recomputes a block's activations in the backward pass in place of keeping them (Chen et
    al. 2016, arXiv:1604.06174). Neither changes the result but by rounding; the others do.
    """

    ranks: Ranks
    carry_rank: RankOrNone  # components of the global adapter held frozen; 0 unless the rule is `carry`
    sequence_len: Several  # tokens; longer examples are cut
    micro_batch: Several
    checkpointing: bool = False
    optimizer: Optimizer = "adamw"
    carried_dtype: CarriedDtype = "float32"

    def __post_init__(self) -> None:
        if min(self.sequence_len, self.micro_batch) < 1 or self.carry_rank < 0:
            raise InputError(
                f"sequence length {self.sequence_len} and micro-batch {self.micro_batch} must be 1 or more, "
                f"and the carry rank {self.carry_rank} not negative"
            )

    def __str__(self) -> str:
        parts = [f"rank {self.ranks}", f"{self.micro_batch} × {self.sequence_len} tokens at a time"]
        parts += [f"carrying {self.carry_rank} in {self.carried_dtype}"] if self.carry_rank else []
        parts += ["checkpointing"] if self.checkpointing else []
        parts += ["8-bit optimiser"] if self.optimizer == "adamw8bit" else []
        return ", ".join(parts)
