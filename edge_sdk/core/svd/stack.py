"""A weighted sum of LoRA updates as one tall product, read in blocks and never copied whole.

`Σ w_k b_k a_k = B diag(w) A` with `B = [b_1 … b_K]` (out, R), `A = [a_1; …; a_K]` (R, in), `R = Σ r_k` and
each w_k repeated r_k times. Updates arrive in float32; the arithmetic needs float64, because Gram matrices
square the condition of what they are made of. A block is widened into one buffer that stays in the cache, so
that this costs next to nothing beside the product that follows, and a module needs no memory but its updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from edge_sdk.core.errors import AdapterError
from edge_sdk.core.lora import LoraFactors

Wide = npt.NDArray[np.float64]

# Rows of B (columns of A) widened at a time. At R = 314, 256 rows cost a tenth more time than 1024 and 4096
# gained nothing; at R = 2000 the buffer has 16 MB.
BLOCK = 1024


class Stack:
    """The factors of one module's updates side by side. All results are float64."""

    def __init__(self, addends: Sequence[tuple[float, LoraFactors]]) -> None:
        """Stack (weight, factors) pairs.

        Raises:
            AdapterError: no addends, or unequal shapes.
        """
        if not addends:
            raise AdapterError("nothing to combine: the list of updates is empty")
        self.shape = addends[0][1].shape
        for _, factors in addends:
            if factors.shape != self.shape:
                raise AdapterError(f"cannot combine shapes {self.shape} and {factors.shape}")
        self.addends = tuple(addends)
        self.parts = tuple(factors for _, factors in addends)
        ranks = [factors.rank for factors in self.parts]
        self.weights: Wide = np.repeat(np.array([weight for weight, _ in addends], np.float64), ranks)
        self.rank = sum(ranks)
        self._starts = [int(start) for start in np.cumsum([0, *ranks])]

    # --- whole matrices, for the paths that need them ---

    def b(self) -> Wide:
        """B diag(w), (out, R), in the column order that LAPACK wants."""
        whole = np.empty((self.shape[0], self.rank), order="F")
        for rows, block in self.b_blocks():
            np.multiply(block, self.weights, out=whole[rows])
        return whole

    def a(self) -> Wide:
        """A, (R, in)."""
        return np.concatenate([part.a.astype(np.float64) for part in self.parts], axis=0)

    def require_finite(self) -> None:
        """Raise AdapterError unless every weight and value is a finite number."""
        values = [self.weights, *(m for part in self.parts for m in (part.b, part.a))]
        if not all(np.isfinite(value).all() for value in values):
            raise AdapterError("an update holds values that are not finite")

    def product(self) -> Wide:
        """The dense sum, (out, in); memory holds it once, and a block of it."""
        whole = np.empty(self.shape)
        for columns, block in self.product_blocks():
            whole[:, columns] = block
        return whole

    def transposed(self) -> Stack:
        """The stack of the transposed sum, without a copy."""
        return Stack([(w, LoraFactors(p.a.T, p.b.T)) for w, p in self.addends])

    # --- blocks ---

    def b_blocks(self) -> Iterator[tuple[slice, Wide]]:
        """(rows, those rows of B without the weights); the next one overwrites the buffer."""
        buffer = np.empty((min(BLOCK, self.shape[0]), self.rank))
        for begin in range(0, self.shape[0], BLOCK):
            rows = slice(begin, min(begin + BLOCK, self.shape[0]))
            block = buffer[: rows.stop - begin]
            for start, part in zip(self._starts, self.parts, strict=False):
                block[:, start : start + part.rank] = part.b[rows]
            yield rows, block

    def a_blocks(self) -> Iterator[tuple[slice, Wide]]:
        """(columns, those columns of A); the next one overwrites the buffer."""
        buffer = np.empty(self.rank * min(BLOCK, self.shape[1]))
        for begin in range(0, self.shape[1], BLOCK):
            columns = slice(begin, min(begin + BLOCK, self.shape[1]))
            width = columns.stop - begin
            block = buffer[: self.rank * width].reshape(self.rank, width)
            for start, part in zip(self._starts, self.parts, strict=False):
                block[start : start + part.rank] = part.a[:, columns]
            yield columns, block

    # --- products ---

    def gram_b(self) -> Wide:
        """BᵀB without the weights, (R, R)."""
        gram = np.zeros((self.rank, self.rank))
        for _, block in self.b_blocks():
            gram += block.T @ block  # numpy sees one matrix and computes half of it (syrk)
        return gram

    def gram_a(self) -> Wide:
        """AAᵀ, (R, R)."""
        gram = np.zeros((self.rank, self.rank))
        for _, block in self.a_blocks():
            gram += block @ block.T
        return gram

    def left(self, x: Wide, probe: Wide) -> tuple[Wide, Wide]:
        """U = B x, (out, k), and Bᵀ U g for a probe g (k, p), in one pass over B."""
        u, seen = np.empty((self.shape[0], x.shape[1])), np.zeros((self.rank, probe.shape[1]))
        for rows, block in self.b_blocks():
            np.matmul(block, x, out=u[rows])
            seen += block.T @ (u[rows] @ probe)
        return u, seen

    def right(self, y: Wide, probe: Wide) -> tuple[Wide, Wide]:
        """Vᵀ = yᵀ A, (k, in), and A V g for a probe g (k, p), in one pass over A."""
        vt, seen = np.empty((y.shape[1], self.shape[1])), np.zeros((self.rank, probe.shape[1]))
        for columns, block in self.a_blocks():
            vt[:, columns] = y.T @ block
            seen += block @ (vt[:, columns].T @ probe)
        return vt, seen

    def left_transposed(self, u: Wide) -> Wide:
        """Bᵀ u, (R, k)."""
        seen = np.zeros((self.rank, u.shape[1]))
        for rows, block in self.b_blocks():
            seen += block.T @ u[rows]
        return seen

    def product_blocks(self) -> Iterator[tuple[slice, Wide]]:
        """(columns, those columns of the dense sum), BLOCK of them at a time."""
        for begin in range(0, self.shape[1], BLOCK):
            columns = slice(begin, min(begin + BLOCK, self.shape[1]))
            block = np.zeros((self.shape[0], columns.stop - begin))
            for start, part in zip(self._starts, self.parts, strict=False):
                weights = self.weights[start : start + part.rank, None]
                block += part.b.astype(np.float64) @ (weights * part.a[:, columns])
            yield columns, block
