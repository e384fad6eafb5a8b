"""Combining one module's updates: the stacked factors against the dense SVD of the summed product.

    python -m benchmarks.aggregation                     # LLaMA-7B shapes; the dense reference takes minutes
    python -m benchmarks.aggregation --quick             # smaller modules, under a minute
    python -m benchmarks.aggregation --json FILE

K = 10 updates of mixed ranks, 4×8, 3×30 and 3×64, combined to rank 64. `GEMM` is a float64 matrix product of
this machine, in the same run, as the yardstick. The error is that of the singular values, as a share of the
largest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from edge_sdk.core.flexlora import combine
from edge_sdk.core.lora import LoraFactors
from edge_sdk.processor import cpu_name

RANKS = (8, 8, 8, 8, 30, 30, 30, 64, 64, 64)
KEPT = 64
SHAPES = {"full": ((4096, 4096), (11008, 4096), (4096, 11008)), "quick": ((1024, 1024), (2752, 1024))}


def updates(shape: tuple[int, int], seed: int) -> list[tuple[float, LoraFactors]]:
    """K weighted updates of one module with the spread that trained factors have: falling, not flat."""
    rng = np.random.default_rng(seed)
    out_features, in_features = shape
    made = []
    for rank in RANKS:
        b = rng.normal(size=(out_features, rank)) * 0.9 ** np.arange(rank)
        made.append(
            (1 / len(RANKS), LoraFactors(b.astype("f4"), rng.normal(size=(rank, in_features)).astype("f4")))
        )
    return made


def dense(addends: list[tuple[float, LoraFactors]]) -> np.ndarray:
    """The reference: form the update, take its full SVD; the singular values."""
    product = np.zeros(addends[0][1].shape)
    for weight, factors in addends:
        product += weight * factors.b.astype(np.float64) @ factors.a.astype(np.float64)
    return np.linalg.svd(product, full_matrices=False)[1]


def seconds(work: Callable[[], Any], runs: int) -> float:
    """Median wall time."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def gemm_gflops(size: int = 1024) -> float:
    """Float64 matrix product of this machine, best of five."""
    a = np.random.default_rng(0).normal(size=(size, size))
    best = min(seconds(lambda: a @ a, 1) for _ in range(5))
    return 2 * size**3 / best / 1e9


def measure(shape: tuple[int, int], runs: int) -> list[dict[str, Any]]:
    """Both methods on one shape."""
    addends = updates(shape, seed=0)
    reference: list[np.ndarray] = []
    dense_s = seconds(lambda: reference.append(dense(addends)), 1)
    stacked_s = seconds(lambda: combine(addends, KEPT), runs)
    found = combine(addends, KEPT).singular_values
    sigmas = reference[0]
    error = float(np.abs(found[:KEPT] - sigmas[:KEPT]).max() / sigmas[0])
    row = {"case": f"{shape[0]}x{shape[1]}", "K": len(RANKS), "stacked_rank": sum(RANKS)}
    return [
        {**row, "method": "dense", "seconds": dense_s, "sigma_relative_error": 0.0, "speedup_vs_dense": 1.0},
        {
            **row,
            "method": "stacked",
            "seconds": stacked_s,
            "sigma_relative_error": error,
            "speedup_vs_dense": dense_s / stacked_s,
        },
    ]


def main() -> int:
    """Measure, print the table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    shapes = SHAPES["quick" if options.quick else "full"]
    rows = [
        row
        for shape in track(shapes, "measuring", console=console, transient=True)
        for row in measure(shape, 5 if options.quick else 3)
    ]
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    machine = {
        "cpu": cpu_name(),
        "threads": threads,
    }
    peak = gemm_gflops()
    table = Table(
        title=f"{machine['cpu']}, threads: {threads}, GEMM {peak:.0f} GFLOP/s", title_justify="left"
    )
    for column in ("module", "method", "seconds", "against dense", "error of σ"):
        table.add_column(column, justify="left" if column in ("module", "method") else "right")
    for row in rows:
        ratio = f"{row['speedup_vs_dense']:.0f}×"
        table.add_row(
            row["case"], row["method"], f"{row['seconds']:.3f}", ratio, f"{row['sigma_relative_error']:.0e}"
        )
    console.print(table)
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine, "gemm_peak_gflops": peak, "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
