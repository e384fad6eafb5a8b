"""One method on one module, or on a whole version, in a process of its own; prints what it took as JSON.

python -m benchmarks.aggregation.child METHOD OUT IN RANK,RANK,…
python -m benchmarks.aggregation.child version FOLDER
python -m benchmarks.aggregation.child gemm
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.aggregation import rivals as aggregation_rivals
from benchmarks.aggregation.cases import KEPT, LLAMA_7B, SMALL, Shape, federation, updates
from coordinator.merging.aggregation import aggregate
from coordinator.merging.sources import Addend, StartVersion
from coordinator.storage.blobs import Blobs
from edge_sdk.core.flexlora import combine
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.svd.decompose import dense_pays
from edge_sdk.core.svd.qr import safe_svd
from edge_sdk.core.svd.stack import Stack
from edge_sdk.core.svd.triplets import PROBES

Addends = list[tuple[float, LoraFactors]]
Sigmas = npt.NDArray[np.floating[Any]]
RUNS = 3  # of a method that takes less than LONG_S; the median counts
LONG_S = 5.0


def dense(addends: Addends) -> Sigmas:
    """The sum of the products in float64 and its SVD with vectors, as the authors' code does it."""
    product = np.zeros(addends[0][1].shape)
    for weight, factors in addends:
        product += weight * factors.b.astype(np.float64) @ factors.a.astype(np.float64)
    return np.linalg.svd(product, full_matrices=False)[1]


def by_qr(addends: Addends) -> Sigmas:
    """QR of both stacks and the SVD of the core: the safe path alone."""
    return safe_svd(Stack(addends), KEPT)[1]


def stacked(addends: Addends) -> Sigmas:
    """What the coordinator does."""
    return combine(addends, min(KEPT, *addends[0][1].shape)).singular_values


METHODS: dict[str, Callable[[Addends], Sigmas]] = {
    "dense": dense,
    "qr": by_qr,
    "stacked": stacked,
    "peft": aggregation_rivals.peft_svd,
    "chorus-fl": aggregation_rivals.chorus_svd,
}


def processor_seconds(work: Callable[[], Any]) -> float:
    """What `work` takes of one core: with one BLAS thread, its wall time where nothing else runs."""
    began = time.process_time()
    work()
    return time.process_time() - began


def gemm_gflops(size: int = 2048) -> float:
    """Float64 matrix product of this machine on one core, best of five."""
    a = np.random.default_rng(0).standard_normal((size, size))
    return 2 * size**3 / min(processor_seconds(lambda: a @ a) for _ in range(5)) / 1e9


def gemm_part_gflops(addends: Addends) -> float:
    """Rate of the products that `stacked` makes of the updates: both Gram matrices, U and V.

    A Gram matrix counts (out or in)·R², since half of it is computed and the other half is its mirror image.
    """
    stack, kept = Stack(addends), min(KEPT, *addends[0][1].shape)
    x, probe = np.zeros((stack.rank, kept)), np.zeros((kept, PROBES))

    def work() -> None:
        stack.gram_b()
        stack.gram_a()
        stack.left(x, probe)
        stack.right(x, probe)

    flops = sum(stack.shape) * (stack.rank**2 + 2 * stack.rank * kept)
    return flops / min(processor_seconds(work) for _ in range(RUNS)) / 1e9


def svd_flops(shape: Shape) -> float:
    """Σ, thin U and V of a dense matrix by R-SVD (Golub and Van Loan, table 8.6.1)."""
    long, short = max(shape), min(shape)
    return 6.0 * long * short**2 + 20.0 * short**3


def qr_flops(shape: Shape, rank: int) -> float:
    """Q and R of both stacks."""
    return 4.0 * sum(shape) * rank**2


def measure(method: str, shape: Shape, ranks: list[int]) -> dict[str, Any]:
    """Seconds, rate, peak memory and the leading singular values of one method on one module."""
    addends = updates(shape, ranks)
    sigmas: list[Sigmas] = []
    times = [processor_seconds(lambda: sigmas.append(METHODS[method](addends)))]
    while times[0] < LONG_S and len(times) < RUNS:
        times.append(processor_seconds(lambda: METHODS[method](addends)))
    seconds = statistics.median(times)
    peak_rss_bytes = rss_bytes()
    if method == "stacked" and not dense_pays(shape, sum(ranks)):
        gflops = gemm_part_gflops(addends)
    elif method == "stacked":
        products = 2.0 * shape[0] * shape[1] * sum(ranks) + min(shape) ** 2 * max(shape)
        gflops = products / seconds / 1e9
    else:
        gflops = (qr_flops(shape, sum(ranks)) if method == "qr" else svd_flops(shape)) / seconds / 1e9
    leading = [float(sigma) for sigma in sigmas[0][:KEPT]]
    return {"seconds": seconds, "gflops": gflops, "peak_rss_bytes": peak_rss_bytes, "sigmas": leading}


def version(folder: Path) -> dict[str, Any]:
    """One published version from files on disk, through the coordinator's own aggregation on every core."""
    ranks = json.loads((folder / "ranks.json").read_text())
    model = next(m for m in (LLAMA_7B, SMALL) if m.name == (folder / "model").read_text())
    paths = [folder / f"update-{number}.safetensors" for number in range(len(ranks))]
    addends = [Addend(p.stem, 1 / len(ranks), p, rank) for p, rank in zip(paths, ranks, strict=True)]
    with tempfile.TemporaryDirectory(dir=folder) as blobs:
        began, processor = time.perf_counter(), time.process_time()
        aggregate(federation(model), 1.0, StartVersion(0), addends, Blobs(Path(blobs)).write)
        wall, processor = time.perf_counter() - began, time.process_time() - processor
    return {"seconds": wall, "processor_s": processor, "peak_rss_bytes": rss_bytes()}


def rss_bytes() -> int:
    """The most memory that this process has held; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: list[str]) -> int:
    """Do what the arguments say."""
    if arguments[0] == "gemm":
        found: dict[str, Any] = {"gflops": gemm_gflops()}
    elif arguments[0] == "version":
        found = version(Path(arguments[1]))
    else:
        method, out, inp, ranks = arguments
        found = measure(method, (int(out), int(inp)), [int(rank) for rank in ranks.split(",")])
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":
        sys.exit("set OMP_NUM_THREADS=1: rates are those of one core")
    sys.exit(main(sys.argv[1:]))
