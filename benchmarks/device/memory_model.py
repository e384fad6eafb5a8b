"""Predicted against measured peak memory of real training, over a grid of models and settings.

    python -m benchmarks.memory_model [--quick] [--json FILE] [--plot FILE]

Every point is a process of its own: it measures what the frameworks take, loads the model in 4 bits, trains
three steps on rows of full length, and reports the highest resident set of the training. The models are built
from a configuration, with random weights. Finished points are kept in the folder given by --resume.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import command
from benchmarks.common.plotting import drawing, headless_pyplot
from benchmarks.common.results import Results
from edge_sdk.core.choice.memory import estimate, human_bytes
from edge_sdk.core.choice.model_facts import ModelFacts, facts_from_config
from edge_sdk.core.choice.setting import Ranks, Setting

STEPS = 3  # the second has the optimiser's moments; the heap settles over a few
RANKS = (2, 8, 16, 32, 64)
SHAPES = ((1, 128), (4, 128), (2, 512))  # examples at a time, tokens


@dataclass(frozen=True)
class Model:
    """A model of the grid and the ranks that it is trained at."""

    name: str
    config: dict[str, Any]
    ranks: tuple[int, ...] = RANKS


def _llama(kind: str, hidden: int, layers: int, intermediate: int, vocab: int) -> dict[str, Any]:
    heads = hidden // 64
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
    }


MODELS = (
    Model("llama-6M", _llama("llama", 256, 6, 768, 4096)),
    Model("llama-40M", _llama("llama", 512, 8, 1376, 32000)),
    Model("gpt2-124M", {"model_type": "gpt2"}),
    Model("llama-222M", _llama("llama", 1024, 16, 2816, 32_000)),
    Model("qwen3-618M", _llama("qwen3", 1280, 24, 3456, 50_000), ranks=(8,)),
)
QUICK = ("llama-6M", "llama-40M")


@dataclass(frozen=True)
class Row:
    """One point. Bytes are of the whole process; `framework_bytes` of it are the libraries."""

    model: str
    parameters: int
    r: int
    batch: int
    sequence_len: int
    gradient_checkpointing: bool
    predicted_bytes: int
    measured_bytes: int
    framework_bytes: int
    step_s: float

    @property
    def error(self) -> float:
        """Relative error of the prediction; negative where it was too low."""
        return self.predicted_bytes / self.measured_bytes - 1


# --- one point, in the child ---------------------------------------------------------------------


def measure(directory: Path, setting: Setting) -> dict[str, Any]:
    """Train for real in this process and say what it took."""
    from edge_sdk.model import base_model
    from edge_sdk.system import process_memory
    from edge_sdk.text.rows import Tokenised
    from edge_sdk.training.plan import Plan, Start
    from edge_sdk.training.trainer import Trainer
    from edge_sdk.trials.library_memory_child import framework_bytes

    base_model.use_threads(1)
    framework = framework_bytes("cpu")
    base = base_model.load(str(directory), device="cpu")
    modules = base_model.describe(str(directory)).modules
    facts = facts_from_config(json.loads((directory / "config.json").read_text()), modules)
    trainer = Trainer(base, modules, 2.0, progress=False)
    batch, length = setting.micro_batch, setting.sequence_len
    draw = np.random.default_rng(0).integers(5, 4000, (batch, length))
    rows = [Tokenised(ids=tuple(map(int, row)), labels=tuple(map(int, row))) for row in draw]
    plan = Plan(STEPS, batch, batch, length, 1e-3, checkpointing=setting.checkpointing)
    base_model.release_memory()
    process_memory.reset_peak()
    done = trainer.train(
        Start(None, None, setting.ranks.largest, 0), rows, plan, on_step=lambda _: "continue"
    )
    measured = process_memory.peak_bytes()
    return {
        "parameters": facts.linear_parameters + facts.other_parameters,
        "measured_bytes": measured,
        "framework_bytes": framework,
        "step_s": done.seconds / STEPS,
    }


# --- the grid, in the parent ---------------------------------------------------------------------


def grid(quick: bool) -> Iterator[tuple[Model, Setting]]:
    """Models × ranks × shapes × recomputation; a diagonal of it where it must be quick."""
    for model in MODELS:
        if quick and model.name not in QUICK:
            continue
        for number, rank in enumerate(model.ranks):
            for batch, length in SHAPES:
                for recomputes in (False, True):
                    if quick and (number % 2 or recomputes != (batch == 1)):
                        continue
                    yield model, Setting(Ranks.uniform(rank), 0, length, batch, recomputes)


def build(model: Model, folder: Path) -> Path:
    """Write the model with random weights, once; its tokeniser is the embedded one."""
    directory = folder / model.name
    if (directory / "done").exists():
        return directory
    code = (
        "import sys, json, torch, transformers; from pathlib import Path\n"
        "values = json.loads(sys.argv[1]); out = sys.argv[2]; tiny = sys.argv[3]\n"
        "config = transformers.AutoConfig.for_model(**values)\n"
        "model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)\n"
        "model.save_pretrained(out)\n"
        "transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(out)\n"
    )
    from edge_sdk.model.files import resolve

    words = [sys.executable, "-W", "ignore", "-c", code, json.dumps(model.config), str(directory)]
    subprocess.run([*words, str(resolve("tiny"))], check=True, stderr=subprocess.DEVNULL)
    (directory / "done").touch()
    return directory


def run_point(directory: Path, setting: Setting) -> dict[str, Any]:
    """Run one point in a process of its own."""
    arguments = [str(directory), str(setting.ranks), str(setting.micro_batch), str(setting.sequence_len)]
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory_model", "--point", *arguments]
    words += [str(int(setting.checkpointing))]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def built_and_run(model: Model, folder: Path, setting: Setting) -> dict[str, Any]:
    """Run one point on a model that is built if it is not in `folder`."""
    return run_point(build(model, folder), setting)


def table(rows: list[Row]) -> str:
    """All points, one a line."""
    lines = ["model         r batch tokens again  predicted   measured   error     step"]
    for row in rows:
        lines.append(
            f"{row.model:<11} {row.r:>3} {row.batch:>5} {row.sequence_len:>6} "
            f"{'yes' if row.gradient_checkpointing else 'no':>5} {human_bytes(row.predicted_bytes):>10} "
            f"{human_bytes(row.measured_bytes):>10} {row.error:>+7.1%} {row.step_s:>6.2f} s"
        )
    return "\n".join(lines)


def summary(rows: list[Row], label: str) -> str:
    """Median and 95th percentile of the absolute error, and the worst under-prediction."""
    errors = np.array([row.error for row in rows])
    return (
        f"{label}: {len(rows)} points, absolute error median {np.median(abs(errors)):.1%}, 95th percentile "
        f"{np.percentile(abs(errors), 95):.1%}, worst under-prediction {min(0.0, errors.min()):.1%}"
    )


def cpu_name() -> str:
    """The processor, as /proc/cpuinfo or Python names it."""
    from edge_sdk.machine import processor

    return processor.cpu_name()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid and print the table."""
    parser = command.parser("memory_model", __doc__)
    parser.add_argument("--quick", action="store_true", help="two small models, under two minutes")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--plot", type=drawing, help="draw predicted against measured into this file")
    parser.add_argument("--resume", type=Path, help="folder that keeps models and finished points")
    parser.add_argument("--point", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.point:
        directory, rank, batch, length, recomputes = options.point
        setting = Setting(Ranks.parse(rank), 0, int(length), int(batch), recomputes == "1")
        print(json.dumps(measure(Path(directory), setting)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        rows = run_grid(options.resume or Path(temporary), options.quick)
    print(table(rows))
    for again in (False, True):
        part = [row for row in rows if row.gradient_checkpointing == again]
        print(summary(part, "recomputing" if again else "plain"))
    print(summary(rows, "all") + "; CUDA: not measured")
    machine = {"cpu": cpu_name(), "system": platform.system(), "libc": " ".join(platform.libc_ver())}
    record = {"machine": machine, "rows": [asdict(row) for row in rows]}
    command.write_json(options.json, record)
    if options.plot:
        draw(rows, options.plot)
    return 0


@functools.cache
def facts_of(directory: Path) -> ModelFacts:
    """What the memory model is told of a model: its configuration, nothing of its weights."""
    from edge_sdk.model import base_model

    config = json.loads((directory / "config.json").read_text())
    return facts_from_config(config, base_model.describe(str(directory)).modules)


def predict(directory: Path, setting: Setting, framework_bytes: int) -> int:
    """Peak of the process by the memory model."""
    from edge_sdk.model import base_model

    placement = replace(base_model.placement("cpu"), framework_bytes=framework_bytes)
    return estimate(facts_of(directory), setting, placement).peak_bytes


def run_grid(folder: Path, quick: bool) -> list[Row]:
    """All points, the finished ones from the folder."""
    results = Results(folder / "points.jsonl", "memory_model", {"steps": STEPS})
    rows, began = [], time.monotonic()
    for model, setting in grid(quick):
        case = {"model": model.name, "ranks": str(setting.ranks), "batch": setting.micro_batch}
        case |= {"sequence_len": setting.sequence_len, "recomputes": setting.checkpointing}
        found = results.get(case, functools.partial(built_and_run, model, folder, setting))
        found["predicted_bytes"] = predict(build(model, folder), setting, found["framework_bytes"])
        rows.append(
            Row(
                model=model.name,
                r=setting.ranks.largest,
                batch=setting.micro_batch,
                sequence_len=setting.sequence_len,
                gradient_checkpointing=setting.checkpointing,
                **found,
            )
        )
        name = " ".join(str(value) for value in case.values())
        print(f"{time.monotonic() - began:6.0f} s  {name}: {rows[-1].error:+.1%}", file=sys.stderr)
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """Predicted against measured, on logarithmic axes."""
    pyplot = headless_pyplot()
    from matplotlib import ticker

    figure, axes = pyplot.subplots(figsize=(6.4, 5.2), layout="constrained")
    for model in MODELS:
        points = [row for row in rows if row.model == model.name]
        if points:
            axes.scatter(
                [row.measured_bytes / 1e6 for row in points],
                [row.predicted_bytes / 1e6 for row in points],
                s=22,
                label=model.name,
            )
    ends = np.array([0.95, 1.05]) * np.array(
        [min(row.measured_bytes for row in rows), max(row.measured_bytes for row in rows)]
    )
    ends = ends / 1e6
    axes.plot(ends, ends, color="0.3", linewidth=1)
    axes.fill_between(ends, 0.95 * ends, 1.1 * ends, color="0.85", label="−5 % to +10 %", zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="measured peak, MB", ylabel="predicted peak, MB")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.FixedLocator([500, 1000, 2000, 4000]))
        axis.set_major_formatter(ticker.ScalarFormatter())
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
