"""Predicted against measured time of real training steps, over a grid of models and settings.

    python -m benchmarks.time_model [--quick] [--json FILE]

Each model has a process of its own, with one compute thread: it calibrates on a cut-down model, as a device
does, then loads the whole model in 4 bits and times real steps of the trainer. A measurement is the median of
the steps after the first, on rows of full length. Times are those of the one processor that computes, which
are wall time on a machine that does nothing else. The models are those of `benchmarks.memory_model`, with
random weights, and the embedded `tiny`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import command
from benchmarks.device.memory_model import MODELS, build
from edge_sdk.core.choice.model_facts import facts_from_config
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.machine.processor import cpu_name
from edge_sdk.model.files import read_config, resolve

LADDER = (2, 8, 32)
LARGEST = (4, 256)  # examples at a time and tokens of the largest step
CARRIED = 16
MOST_STEPS, ENOUGH_S = 6, 1.0
QUICK = ("tiny", "llama-40M")


@dataclass(frozen=True)
class Row:
    """One point. Times are of one optimiser step."""

    model: str
    r: int
    carry_rank: int
    batch: int
    micro_batch: int
    sequence_len: int
    gradient_checkpointing: bool
    predicted_s: float
    measured_s: float

    @property
    def ratio(self) -> float:
        """Predicted by measured."""
        return self.predicted_s / self.measured_s


def grid(quick: bool) -> Iterator[tuple[int, Setting]]:
    """(examples in a step, how they are computed)."""
    for rank in LADDER if not quick else LADDER[::2]:
        for batch, length in ((1, 128), (4, 128), LARGEST):
            yield batch, Setting(Ranks.uniform(rank), 0, length, batch)
    low = Ranks.uniform(LADDER[0])
    yield 4, Setting(low, 0, 128, 4, checkpointing=True)
    yield 4, Setting(low, 0, 128, 1)
    yield 4, Setting(low, CARRIED, 128, 4, carried_dtype="int8")
    if not quick:
        yield 4, Setting(low, CARRIED, 128, 4, checkpointing=True, carried_dtype="nf4")
        yield 4, Setting(Ranks(LADDER[0], LADDER[-1]), 0, 128, 4)


# --- one model, in the child ---------------------------------------------------------------------


def measure(name: str, directory: Path, quick: bool) -> dict[str, Any]:
    """Calibrate, then time every setting; rows, constants and the seconds that calibration took."""
    from edge_sdk.model import base_model
    from edge_sdk.training.trainer import Trainer
    from edge_sdk.trials import step_times_child

    base_model.use_threads(1)
    base_model.import_libraries()
    began = time.monotonic()
    largest = step_times_child.LargestStep(*LARGEST, tuple(map(Ranks.uniform, LADDER)), carries=True)
    config = read_config(directory)
    times = step_times_child.step_times(config, largest, "cpu", clock=time.process_time)
    calibrated_s = time.monotonic() - began
    modules = base_model.target_modules(directory)
    facts = facts_from_config(config, modules)
    trainer = Trainer(base_model.load(str(directory), device="cpu"), modules, 1.0, progress=False)
    rows = []
    for batch, setting in grid(quick):
        measured_s = step_s(trainer, modules, batch, setting)
        row = Row(
            model=name,
            r=setting.ranks.largest,
            carry_rank=setting.carry_rank,
            batch=batch,
            micro_batch=setting.micro_batch,
            sequence_len=setting.sequence_len,
            gradient_checkpointing=setting.checkpointing,
            predicted_s=times.step_s(facts, setting, batch),
            measured_s=measured_s,
        )
        print(f"{name} {setting}: {row.ratio:.2f}", file=sys.stderr)
        rows.append(asdict(row))
    return {"rows": rows, "times": asdict(times), "calibrated_s": calibrated_s}


def step_s(trainer: Any, modules: Any, batch: int, setting: Setting) -> float:
    """Median seconds of real steps."""
    from edge_sdk.core.lora import LoraFactors
    from edge_sdk.text.rows import Tokenised
    from edge_sdk.training.plan import Plan, Start
    from edge_sdk.trials.step_times_child import Stopwatch

    draw = np.random.default_rng(0)
    ids = draw.integers(5, 4000, (batch, setting.sequence_len))
    rows = [Tokenised(ids=tuple(map(int, row)), labels=tuple(map(int, row))) for row in ids]
    carried = {
        module: LoraFactors(
            draw.uniform(-1e-3, 1e-3, (out, setting.carry_rank)).astype("f4"),
            draw.uniform(-1e-3, 1e-3, (setting.carry_rank, in_)).astype("f4"),
        )
        for module, (out, in_) in modules.items()
    }
    plan = Plan(
        1 + MOST_STEPS,
        batch,
        setting.micro_batch,
        setting.sequence_len,
        1e-6,
        checkpointing=setting.checkpointing,
    )
    watch = Stopwatch(time.process_time, ENOUGH_S)
    trainer.train(
        Start(None, carried if setting.carry_rank else None, setting.ranks, 0, setting.carried_dtype),
        rows,
        plan,
        on_step=watch,
    )
    return watch.median_s()


# --- the grid, in the parent ---------------------------------------------------------------------


def run_model(name: str, directory: Path, quick: bool) -> dict[str, Any]:
    """One model in a process of its own."""
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.time_model", "--model", name, str(directory)]
    done = subprocess.run(
        words + ["--quick"] * quick, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: list[Row]) -> str:
    """All points, one a line."""
    lines = ["model        r carried  step       again  predicted   measured  ratio"]
    for row in rows:
        step = f"{row.batch} × {row.sequence_len}"
        step += f" by {row.micro_batch}" if row.micro_batch < row.batch else ""
        lines.append(
            f"{row.model:<10} {row.r:>3} {row.carry_rank:>7}  {step:<12} "
            f"{'yes' if row.gradient_checkpointing else 'no':>3} {row.predicted_s:>8.2f} s "
            f"{row.measured_s:>8.2f} s {row.ratio:>6.2f}"
        )
    return "\n".join(lines)


def summary(rows: list[Row], label: str) -> str:
    """Median ratio, how many are within 15 %, and the extremes."""
    ratios = np.array([row.ratio for row in rows])
    within = int((abs(ratios - 1) <= 0.15).sum())
    return (
        f"{label}: {len(rows)} settings, predicted/measured median {np.median(ratios):.2f}, "
        f"from {ratios.min():.2f} to {ratios.max():.2f}, {within} within 15 %"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid and print the table."""
    parser = command.parser("time_model", __doc__)
    parser.add_argument("--quick", action="store_true", help="two small models, fewer settings")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--models", type=Path, help="folder that keeps the models that were built")
    parser.add_argument("--model", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.model:
        name, directory = options.model
        print(json.dumps(measure(name, Path(directory), options.quick)))
        return 0
    rows, calibrations = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.models or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        places: dict[str, Callable[[], Path]] = {"tiny": lambda: resolve("tiny")}
        places |= {model.name: (lambda model=model: build(model, folder)) for model in MODELS}
        for name, place in places.items():
            if options.quick and name not in QUICK:
                continue
            found = run_model(name, place(), options.quick)
            rows += [Row(**values) for values in found.pop("rows")]
            calibrations[name] = found
    print(table(rows))
    for name, found in calibrations.items():
        mine = [row for row in rows if row.model == name]
        print(summary(mine, f"{name} (calibrated in {found['calibrated_s']:.1f} s)"))
    print(summary(rows, "all") + "; CUDA: not measured")
    machine = {"cpu": cpu_name(), "system": platform.system(), "threads": 1}
    record = {"machine": machine, "rows": [asdict(row) for row in rows], "calibrations": calibrations}
    command.write_json(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
