"""Making a version's files: all ranks of a ladder in one pass, against one by one, and against writing alone.

    python -m benchmarks.serving                         # eight blocks of LLaMA-7B shapes; a minute or two
    python -m benchmarks.serving --quick                 # one block, seconds
    python -m benchmarks.serving --json FILE

"plain write" is the same number of bytes put into files of the same sizes from memory, in the same run: what
no way of making them can beat. Times are of this process's processor, the kernel's part included, so that a
busy machine does not count; the least of several runs. Nothing is fsynced: these files can be made again.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from rich.table import Table

from benchmarks.common import command
from coordinator.adapters.ladder import Rung, file_name, write_rungs
from coordinator.storage.blobs import Blobs
from edge_sdk.core.adapter_file.codec import encode_chunks
from edge_sdk.core.adapter_file.dtypes import WIRE_DTYPES, WireDtype
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Base, Federation

LADDER = (2, 4, 8, 16, 24, 32, 48, 64)
STORED_RANK = 64
BLOCK = {  # one block of LLaMA-7B
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    **{f"mlp.{name}_proj": (11008, 4096) for name in ("gate", "up")},
    "mlp.down_proj": (4096, 11008),
}


def federation(blocks: int) -> Federation:
    """One whose base has so many blocks."""
    modules = {f"model.layers.{i}.{name}": shape for i in range(blocks) for name, shape in BLOCK.items()}
    return Federation(
        "bench", Base("7B", "0" * 64, modules), "flexlora", LADDER, STORED_RANK, 2.0, "balanced"
    )


def stored(of: Federation, blobs: Blobs) -> Path:
    """A version in canonical form, of falling singular values."""

    def modules() -> Iterator[tuple[str, LoraFactors]]:
        draw = np.random.default_rng(0)
        sigmas = 0.9 ** np.arange(STORED_RANK)
        for name in sorted(of.base.modules):
            out_features, in_features = of.base.modules[name]
            b = draw.standard_normal((out_features, STORED_RANK)).astype(np.float32)
            a = draw.standard_normal((STORED_RANK, in_features)).astype(np.float32)
            b *= (sigmas / np.linalg.norm(b, axis=0)).astype(np.float32)
            yield name, LoraFactors(b, a / np.linalg.norm(a, axis=1, keepdims=True))

    ranks = dict.fromkeys(of.base.modules, STORED_RANK)
    return blobs.path(blobs.write(encode_chunks(of.base.modules, ranks, of.scaling, modules())))


def seconds(work: Callable[[], Any], runs: int) -> tuple[float, float]:
    """Processor and wall time, the least of each."""
    times = []
    for _ in range(runs):
        began = time.process_time(), time.perf_counter()
        work()
        times.append((time.process_time() - began[0], time.perf_counter() - began[1]))
    return min(cpu for cpu, _ in times), min(wall for _, wall in times)


def plain_write(folder: Path, sizes: list[int]) -> None:
    """Files of these sizes, from memory."""
    piece = np.random.default_rng(0).bytes(1 << 20)
    for number, size in enumerate(sizes):
        with (folder / f"plain-{number}").open("wb") as file:
            for begin in range(0, size, len(piece)):
                file.write(piece[: size - begin])


def measure(of: Federation, blobs: Blobs, current: Path, dtype: WireDtype, runs: int) -> list[dict[str, Any]]:
    """All ways of making files in one dtype."""
    wanted, place = [Rung(rank, dtype) for rank in LADDER], blobs.caching
    write_rungs(of, 1, current, wanted, place)  # what is read lies in memory from here on
    sizes = [blobs.cached(file_name(of, 1, rung)).stat().st_size for rung in wanted]

    def one_by_one() -> None:
        for rung in wanted:
            write_rungs(of, 1, current, [rung], place)

    folder = blobs.cached("x").parent
    ways: dict[str, tuple[Callable[[], Any], list[int]]] = {
        "plain write": (lambda: plain_write(folder, sizes), sizes),
        "ladder in one pass": (lambda: write_rungs(of, 1, current, wanted, place), sizes),
        "ladder, rank by rank": (one_by_one, sizes),
        f"rank {LADDER[-1]} alone": (lambda: write_rungs(of, 1, current, wanted[-1:], place), sizes[-1:]),
        f"rank {LADDER[0]} alone": (lambda: write_rungs(of, 1, current, wanted[:1], place), sizes[:1]),
    }
    rows = []
    for way, (work, written) in ways.items():
        cpu, wall = seconds(work, runs)
        row = {"dtype": dtype, "way": way, "files": len(written), "bytes": sum(written)}
        row |= {"cpu_seconds": cpu, "wall_seconds": wall}
        rows.append(row | {"against_plain_write": cpu / rows[0]["cpu_seconds"] if rows else 1.0})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write JSON if asked."""
    parser = command.parser("serving", __doc__)
    parser.add_argument("--quick", action="store_true", help="one block; noise, not a result")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    console = command.console(150)
    blocks, runs = (1, 3) if options.quick else (8, 5)
    folder = Path(tempfile.mkdtemp())
    try:
        of, blobs = federation(blocks), Blobs(folder)
        current = stored(of, blobs)
        rows = [
            row
            for dtype in track(WIRE_DTYPES, "measuring", console=console, transient=True)
            for row in measure(of, blobs, current, dtype, runs)
        ]
    finally:
        shutil.rmtree(folder)
    machine = command.machine()
    title = f"{machine['cpu']}; {blocks} blocks of LLaMA-7B, stored rank {STORED_RANK}, ladder {LADDER}"
    table = Table(title=title, title_justify="left")
    for column in ("dtype", "way", "files", "MB", "CPU seconds", "against plain write"):
        table.add_column(column, justify="left" if column in ("dtype", "way") else "right")
    for row in rows:
        size, took, ratio = row["bytes"] / 1e6, row["cpu_seconds"], row["against_plain_write"]
        table.add_row(
            row["dtype"], row["way"], str(row["files"]), f"{size:.1f}", f"{took:.3f}", f"{ratio:.2f}"
        )
    console.print(table)
    document = {"machine": machine, "blocks": blocks, "ladder": LADDER, "rows": rows}
    command.write_json(options.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
