"""LoRA factors with the scaling folded in, and the PEFT boundary where it is folded.

A LoRA layer adds `s·B·A` to a frozen weight of shape (out, in), with `s = lora_alpha / r`, or
`lora_alpha / sqrt(r)` for rsLoRA (Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023,
arXiv:2312.03732). Everything inside this project works on `B̃ = s·B`, so that the effective update is
`B̃·A` and no α can be forgotten. `fan_in_fan_out` layers (GPT-2's Conv1D) need nothing here: PEFT keeps
their `lora_A` as (r, in) and `lora_B` as (out, r) too, and transposes only when it merges.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.core.errors import AdapterError

Matrix = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class LoraFactors:
    """The update `b @ a` of one module. `b`: (out, r) with the scaling folded in; `a`: (r, in)."""

    b: Matrix
    a: Matrix

    def __post_init__(self) -> None:
        if self.b.ndim != 2 or self.a.ndim != 2 or self.b.shape[1] != self.a.shape[0]:
            raise AdapterError(f"factors do not chain: B is {self.b.shape}, A is {self.a.shape}")

    @staticmethod
    def empty(out_features: int, in_features: int) -> LoraFactors:
        """No components: the zero update of a module of shape (out, in)."""
        return LoraFactors(np.zeros((out_features, 0), np.float32), np.zeros((0, in_features), np.float32))

    @property
    def rank(self) -> int:
        """Number of components r (columns of B, rows of A); dead ones count."""
        return int(self.b.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the module that the product updates."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def product(self) -> Matrix:
        """The dense update `b @ a`, (out, in). For tests and small modules: the point is not to form it."""
        return self.b @ self.a

    def norm(self) -> float:
        """Frobenius norm of the product, from the two r × r Gram matrices: ‖BA‖² = tr((BᵀB)(AAᵀ))."""
        b, a = self.b.astype(np.float64), self.a.astype(np.float64)
        return math.sqrt(max(0.0, float(np.sum((b.T @ b) * (a @ a.T)))))

    def leading(self, rank: int) -> LoraFactors:
        """The first `rank` components, as views."""
        return LoraFactors(self.b[:, :rank], self.a[:rank])


def stacked(addends: Sequence[tuple[float, LoraFactors]]) -> LoraFactors:
    """`Σ w_k b_k a_k` of one module as factors of rank Σ r_k: [w_1 b_1 …] [a_1; …]. Nothing is decomposed."""
    b = np.concatenate([weight * f.b for weight, f in addends], axis=1)
    return LoraFactors(b, np.concatenate([f.a for _, f in addends], axis=0))


Adapter = Mapping[str, LoraFactors]
"""Module name (as in the base model, e.g. `model.layers.0.self_attn.q_proj`) to its factors."""


def max_rank(adapter: Adapter) -> int:
    """The largest module rank of an adapter; 0 for an empty one."""
    return max((factors.rank for factors in adapter.values()), default=0)


def peft_scaling(rank: int, alpha: float, use_rslora: bool = False) -> float:
    """`s` of a PEFT LoRA layer: alpha / r, or alpha / √r with rsLoRA."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def peft_module_scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """`s` of `module` under a PEFT adapter config (`lora_alpha`, `alpha_pattern`, `use_rslora`).

    PEFT matches a pattern key against the whole module name or its dotted tail; the first match wins.
    """
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    return peft_scaling(rank, alpha, bool(config.get("use_rslora", False)))
