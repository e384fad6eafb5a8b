"""What rounding on the wire loses, without training: block sizes of int8, and error feedback.

python -m benchmarks.wire_rounding                   # half a minute
python -m benchmarks.wire_rounding --json FILE
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import command
from benchmarks.wire.error_feedback import corrected, next_residual
from edge_sdk.core.adapter_file.dtypes import dequantised, pack, quantised, unpack
from edge_sdk.core.flexlora import pad
from edge_sdk.core.lora import LoraFactors, Matrix

SHAPE, RANK, SEEDS = (768, 256), 4, 5
BLOCKS = (32, 64, 128, 256)
UPLOADS = (1, 5, 20, 60)
RESIDUALS = {"no feedback": 0, "residual of rank r": 1, "of rank 2r": 2, "of rank 4r": 4, "not cut": 10**6}


def change(draw: np.random.Generator, target: Matrix) -> LoraFactors:
    """What a device might learn in one assignment: the target's share along fresh rows, and noise."""
    fresh = pad(LoraFactors.empty(*SHAPE), RANK, str(draw.integers(2**60))).a * np.float32(4)
    b = target @ np.linalg.pinv(fresh.astype(np.float64))
    noise = draw.standard_normal(b.shape) * np.abs(b).mean()
    return LoraFactors((b + noise).astype(np.float32), fresh)


def target_of(draw: np.random.Generator) -> Matrix:
    """What all assignments have in common, of rank 16."""
    return draw.standard_normal((SHAPE[0], 16)) @ draw.standard_normal((16, SHAPE[1])) * 1e-3


def block_rows() -> list[dict[str, Any]]:
    """Relative error of the product, and bytes of a value, for sizes of the block."""
    rows = []
    for block in BLOCKS:
        for name, scale in (("float32", np.float32), ("float16", np.float16)):
            errors = []
            for seed in range(SEEDS):
                draw = np.random.default_rng(seed)
                f = change(draw, target_of(draw))
                a, b = (_rounded(rows, block, scale) for rows in (f.a, f.b.T))
                errors.append(np.linalg.norm(b.T @ a - f.product()) / np.linalg.norm(f.product()))
            size = 1 + np.dtype(scale).itemsize / block
            rows.append({"block": block, "scales": name, "bytes": size, "error": statistics.mean(errors)})
    return rows


def _rounded(rows: Matrix, block: int, scale: type[np.floating[Any]]) -> Matrix:
    """Rows there and back, with scales that are themselves rounded."""
    values, scales = quantised(rows, block)
    return dequantised(values, scales.astype(scale), block)


def feedback_rows() -> list[dict[str, Any]]:
    """‖Σ sent − Σ trained‖ / ‖Σ trained‖ after some uploads of one device in int8."""
    rows = []
    for name, ranks in RESIDUALS.items():
        errors: dict[int, list[float]] = {count: [] for count in UPLOADS}
        for seed in range(SEEDS):
            for count, error in _uploads(seed, ranks * RANK).items():
                errors[count].append(error)
        rows.append({"residual": name, **{str(c): statistics.mean(found) for c, found in errors.items()}})
    return rows


def _uploads(seed: int, rank_cap: int) -> dict[int, float]:
    """The error after so many uploads; `rank_cap` 0: without feedback."""
    draw = np.random.default_rng(seed)
    target, residual, found = target_of(draw), None, {}
    trained, sent = np.zeros(SHAPE), np.zeros(SHAPE)
    for count in range(1, max(UPLOADS) + 1):
        f = change(draw, target)
        received = unpack(pack(corrected(f, residual), 2.0, "int8").tensors, 2.0)
        residual = next_residual(f, residual, received, rank_cap) if rank_cap else None
        trained, sent = trained + f.product(), sent + received.product()
        if count in UPLOADS:
            found[count] = float(np.linalg.norm(sent - trained) / np.linalg.norm(trained))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and write JSON if asked."""
    parser = command.parser("wire_rounding", __doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    console = Console()
    blocks, feedback = block_rows(), feedback_rows()
    table = Table(title=f"int8 of a rank-{RANK} change of shape {SHAPE}", title_justify="left")
    for column in ("values to a scale", "scales in", "bytes a value", "error of the product"):
        table.add_column(column, justify="right")
    for row in blocks:
        table.add_row(str(row["block"]), row["scales"], f"{row['bytes']:.3f}", f"{row['error']:.2%}")
    console.print(table)
    table = Table(title="Error of the sum of uploads in int8, after so many", title_justify="left")
    for column in ("error feedback", *map(str, UPLOADS)):
        table.add_column(column, justify="left" if column == "error feedback" else "right")
    for row in feedback:
        table.add_row(row["residual"], *(f"{row[str(count)]:.3%}" for count in UPLOADS))
    console.print(table)
    command.write_json(options.json, {"blocks": blocks, "feedback": feedback})
    return 0


if __name__ == "__main__":
    sys.exit(main())
