"""Combining updates: the stacked factors against the dense SVD, on one module and on a whole version.

    python -m benchmarks.aggregation                  # LLaMA-7B: about ten minutes of one core
    python -m benchmarks.aggregation --quick          # an eighth of its width, under a minute
    python -m benchmarks.aggregation --rivals         # peft and chorus-fl too, in a throw-away environment
    python -m benchmarks.aggregation --json FILE --plot FILE

Each method runs in a process of its own with one BLAS thread. `seconds` of a module are processor seconds, so
that other programs on the machine do not count; of a whole version, the wall time on every core. `dense` is
measured once for each shape, because its time depends on nothing else, and a version's is the sum over its
modules. GFLOP/s: of `stacked` over the products that it makes of the updates, of the others over all they do.
Errors are of the kept singular values, as a share of the largest, against `dense` (float64) for the first mix
of ranks and against `qr` for the others, up to R = min(out, in) / 2. peft is measured on square modules only:
the full matrices that it asks for make it many times slower still on others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.aggregation.cases import LLAMA_7B, MIXES, SMALL, Mix, Model, Shape, write_updates
from benchmarks.aggregation.rivals import environment
from benchmarks.common import command
from benchmarks.common.plotting import drawing
from edge_sdk.machine.processor import cpu_name

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
RIVALS = ("peft", "chorus-fl")

SCALED = ", scaled by count"


def child(*arguments: object, python: str = sys.executable, threads: str = "1") -> Row:
    """What a child process measured."""
    done = subprocess.run(
        [python, "-m", "benchmarks.aggregation.child", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured: Row = json.loads(done.stdout.splitlines()[-1])
    return measured


def module_rows(model: Model, mix: Mix, dense: dict[Shape, Row], rivals: str | None) -> Iterator[Row]:
    """Every method on one module of each shape."""
    for shape in model.counts():
        ranks = mix.ranks(shape)
        text = ",".join(map(str, ranks))
        if shape not in dense:
            dense[shape] = child("dense", *shape, text) | {"ranks": ranks}
        found: dict[str, Row] = {}
        if dense[shape]["ranks"] == ranks:
            found["dense"] = dense[shape]
        if 2 * sum(ranks) <= min(shape):
            found["qr"] = child("qr", *shape, text)
        found["stacked"] = child("stacked", *shape, text)
        if rivals and "dense" in found:
            square = shape[0] == shape[1]
            names = RIVALS if square else ("chorus-fl",)
            found |= {name: child(name, *shape, text, python=rivals) for name in names}
        reference = found.get("dense", found.get("qr"))
        for method, measured in found.items():
            yield {
                "case": f"{shape[0]}x{shape[1]}, {mix.name}",
                "method": method,
                "K": len(ranks),
                "stacked_rank": sum(ranks),
                "seconds": measured["seconds"],
                "gflops": measured["gflops"],
                "peak_rss_bytes": measured["peak_rss_bytes"],
                "sigma_relative_error": error(measured["sigmas"], reference["sigmas"]) if reference else None,
                "speedup_vs_dense": dense[shape]["seconds"] / measured["seconds"],
            }


def error(sigmas: list[float], reference: list[float]) -> float:
    """The largest difference of a singular value as a share of the largest."""
    return max(abs(one - other) for one, other in zip(sigmas, reference, strict=True)) / reference[0]


def version_rows(model: Model, mix: Mix, rows: list[Row]) -> list[Row]:
    """A whole version from files, and what its modules take one after the other by other methods."""
    totals: dict[str, float] = {}
    errors: dict[str, float] = {}
    for shape, count in model.counts().items():
        for row in rows:
            if (
                row["case"] == f"{shape[0]}x{shape[1]}, {mix.name}"
                and row["sigma_relative_error"] is not None
            ):
                totals[row["method"]] = totals.get(row["method"], 0.0) + count * row["seconds"]
                errors[row["method"]] = max(errors.get(row["method"], 0.0), row["sigma_relative_error"])
    with tempfile.TemporaryDirectory() as folder:
        write_updates(model, mix.attention, Path(folder))
        (Path(folder) / "model").write_text(model.name)
        measured = child("version", folder)
    print(f"a version took {measured['processor_s']:.1f} processor seconds", file=sys.stderr)
    case = f"a version of {model.name}, {mix.name}"
    common = {"case": case, "K": len(mix.attention), "stacked_rank": sum(mix.attention)}
    made = []
    totals.pop("peft", None)  # not measured on every shape
    for method, total in totals.items():
        seconds = measured["seconds"] if method == "stacked" else total
        made.append(
            common
            | {
                "method": method if method == "stacked" else f"{method}{SCALED}",
                "seconds": seconds,
                "gflops": None,
                "peak_rss_bytes": measured["peak_rss_bytes"] if method == "stacked" else None,
                "sigma_relative_error": errors[method],
                "speedup_vs_dense": totals["dense"] / seconds,
            }
        )
    return made


def show(console: Console, rows: list[Row], title: str) -> None:
    """The table."""
    table = Table(title=title, title_justify="left")
    for column in (
        "case",
        "method",
        "K",
        "R",
        "seconds",
        "GFLOP/s",
        "peak MB",
        "error of σ",
        "against dense",
    ):
        table.add_column(column, justify="left" if column in ("case", "method") else "right")
    for row in rows:
        table.add_row(
            row["case"],
            row["method"],
            str(row["K"]),
            str(row["stacked_rank"]),
            f"{row['seconds']:.3g}",
            "–" if row["gflops"] is None else f"{row['gflops']:.0f}",
            "–" if row["peak_rss_bytes"] is None else f"{row['peak_rss_bytes'] / 1e6:.0f}",
            "–" if row["sigma_relative_error"] is None else f"{row['sigma_relative_error']:.0e}",
            f"{row['speedup_vs_dense']:.3g}×",
        )
    console.print(table)


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Seconds of each method in each case, on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(9, 1.2 + 0.55 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours: dict[str, str] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        plain = method.removesuffix(SCALED)
        colour = colours.setdefault(plain, f"C{len(colours)}")
        points = [(row["seconds"], cases.index(row["case"])) for row in rows if row["method"] == method]
        inside = colour if plain == method else "none"  # hollow: not measured as a whole
        axes.scatter(*zip(*points, strict=True), label=method, s=36, edgecolors=colour, facecolors=inside)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the files asked for."""
    parser = command.parser("aggregation", __doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rivals", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=drawing)
    options = parser.parse_args(arguments)
    model, mixes = (SMALL, MIXES[:2]) if options.quick else (LLAMA_7B, MIXES)
    console = command.console(150)
    with tempfile.TemporaryDirectory() as folder:
        rivals = str(environment(Path(folder))) if options.rivals else None
        dense: dict[Shape, Row] = {}
        rows: list[Row] = []
        for mix in mixes:
            for row in module_rows(model, mix, dense, rivals):
                rows.append(row)
                print(f"{row['case']}  {row['method']}  {row['seconds']:.3g} s", file=sys.stderr)
    rows = version_rows(model, mixes[0], rows) + rows
    peak = child("gemm")["gflops"]
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads_per_process": 1}
    title = f"{machine['cpu']}, one core: {peak:.0f} GFLOP/s in a float64 matrix product"
    show(console, rows, title)
    command.write_json(options.json, {"machine": machine, "gemm_peak_gflops": peak, "rows": rows})
    if options.plot:
        plot(rows, options.plot, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
