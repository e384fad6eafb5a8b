"""What the agent costs: a training step through it against the same step in a bare PEFT loop.

    python -m benchmarks.client_overhead                 # 10 runs of 60 pairs of steps
    python -m benchmarks.client_overhead --quick         # under a minute
    python -m benchmarks.client_overhead --model DIRECTORY --json FILE

The agent takes part in a federation of a coordinator process on this machine, as in production: heartbeats
over HTTP, conditions (the load of other programs, measured every 3 s), events, a progress callback, and
checkpoints. Half of the time is the bare loop's, so that a heartbeat every 10 s is the default of one in 5 s
of the agent's own time, and a checkpoint every 12 s five times as many as the default.

The bare loop is `get_peft_model` on a second copy of the same NF4 base: same rank, same rows in the same
batches, AdamW without weight decay, clipping at norm 1, logits at label positions only (`logits_to_keep`),
loss read on every step. Each bare step follows the agent's step on the same rows, in the same thread; a
run is one assignment, its ratio the agent's time over the bare loop's, summed over the steps but for the
first two. What happens between assignments (download, upload) is no step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from benchmarks.common import command
from edge_sdk.agent import Agent
from edge_sdk.callbacks import Callbacks
from edge_sdk.conditions import Conditions
from edge_sdk.core.errors import EdgeError
from edge_sdk.core.messages import Assignment, Base
from edge_sdk.core.records import to_json
from edge_sdk.machine.processor import cpu_name
from edge_sdk.model import base_model
from edge_sdk.options import Event, Options
from edge_sdk.text.rows import IGNORED, Tokenised, collate, load_examples, tokenise
from edge_sdk.training.plan import batch_indices
from examples import smart_home
from examples.local_federation import LocalFederation, write_jsonl

RANK, SCALING, BATCH, SEQUENCE_LEN, RATE = 8, 2.0, 8, 256, 1e-3
SKIPPED = 2  # steps of an assignment that are not counted: optimiser state is made, caches are cold
CONFIG = """base = "base.json"
[federation]
rule = "flexlora"
ladder = [{rank}]
rank_cap = {rank}
scaling = {scaling}
heartbeat_s = 10.0
[training]
steps = {steps}
batch = {batch}
sequence_len = {sequence_len}
learning_rate = {rate}
checkpoint_s = 12.0
[policy]
buffer_size = 1
retry_s = 0.2
"""


class BareLoop:
    """The loop that somebody writes with PEFT alone."""

    def __init__(self, model: str, base: Base, data: Path) -> None:
        from peft import LoraConfig, get_peft_model

        loaded = base_model.load(model)
        config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=list(base.modules))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = get_peft_model(loaded.model, config)
        self.device, self.pad_id = loaded.device, loaded.tokenizer.pad_token_id
        self.rows = [tokenise(e, loaded.tokenizer, SEQUENCE_LEN) for e in load_examples(data)]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0)

    def step(self, rows: list[Tokenised]) -> float:
        """One optimiser step; the loss."""
        batch = collate(sorted(rows, key=lambda row: len(row.ids)), self.pad_id)
        labels = torch.from_numpy(batch.labels)
        keep = (labels[:, 1:] != IGNORED).any(0).nonzero().squeeze(1)
        targets = labels[:, keep + 1].to(self.device)
        logits = self.model(
            input_ids=torch.from_numpy(batch.ids).to(self.device),
            attention_mask=torch.from_numpy(batch.mask).to(self.device),
            use_cache=False,
            logits_to_keep=keep.to(self.device),
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


@dataclass
class Run:
    """Seconds of each counted step of one assignment."""

    agent: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The agent's time over the bare loop's."""
        return sum(self.agent) / sum(self.bare)


class Pairs:
    """Hears of each step of the agent, and takes the bare one after it on the same rows."""

    def __init__(self, bare: BareLoop, bar: Progress, task: TaskID) -> None:
        self._bare, self._bar, self._task = bare, bar, task
        self.runs: list[Run] = []
        self.agent: Agent | None = None
        self._work: Assignment | None = None
        self._since = 0.0

    def on_progress(self, event: Event) -> None:
        """End of an agent's step; the next begins when this returns."""
        _wait_for_device()
        agent_s = time.perf_counter() - self._since
        assert self.agent is not None
        if event.step == 1:
            session = self.agent.journal.load()
            assert session is not None
            self._work = session.current()
            self.runs.append(Run())
        assert self._work is not None
        rows = self._bare.rows
        indices = batch_indices(len(rows), BATCH, event.step - 1, self._work.seed)
        began = time.perf_counter()
        self._bare.step([rows[index] for index in indices])
        _wait_for_device()
        bare_s = time.perf_counter() - began
        if event.step > SKIPPED:
            self.runs[-1].agent.append(agent_s)
            self.runs[-1].bare.append(bare_s)
        self._bar.advance(self._task)
        self._since = time.perf_counter()


def _wait_for_device() -> None:
    """Kernels that were started count to the step that started them."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(folder: Path, model: str, runs: int, steps: int, console: Console) -> list[Run]:
    """Interleave both loops over `runs` assignments of `steps` steps."""
    home = smart_home.households(6, seed=0)[0]
    data = folder / "data.jsonl"
    write_jsonl(data, home.train)
    base = base_model.describe(model)
    (folder / "base.json").write_text(json.dumps(to_json(base)))
    config = CONFIG.format(
        rank=RANK, scaling=SCALING, steps=steps, batch=BATCH, sequence_len=SEQUENCE_LEN, rate=RATE
    )
    federation = LocalFederation(folder, config)
    bare = BareLoop(model, base, data)
    try:
        federation.start_coordinator()
        with Progress(console=console, transient=True) as bar:
            pairs = Pairs(bare, bar, bar.add_task("measuring", total=runs * steps))
            pairs.agent = Agent(
                federation.url,
                data=data,
                join_token=federation.token,
                options=Options(
                    state_dir=folder / "device",
                    model=model,
                    isolate=False,  # both loops take turns in this process
                    nice=0,
                    conditions=Conditions(cpu_below=100),
                ),
                on_event=lambda event: None,
                callbacks=Callbacks(on_progress=pairs.on_progress),
            )
            pairs.agent.run(updates=runs)
            pairs.agent.close()
    finally:
        federation.close()
    return pairs.runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write JSON if asked."""
    parser = command.parser("client_overhead", __doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default="tiny", help="`tiny`, a Hugging Face id or a directory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs, steps = (3, 40) if options.quick else (10, 60)
    console = Console()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), options.model, runs, steps, console)
    except EdgeError as error:
        print(f"client_overhead: {error}", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "torch": torch.__version__,
    }
    _report(found, options, machine, console)
    return 0


def _report(runs: list[Run], options: argparse.Namespace, machine: dict[str, Any], console: Console) -> None:
    """The table for people, the file for programs."""
    table = Table(title=f"{options.model}, r = {RANK}, batch {BATCH}: {machine['cpu']}", title_justify="left")
    for column in ("run", "steps", "agent, ms a step", "bare, ms a step", "ratio"):
        table.add_column(column, justify="right")
    rows = []
    for number, run in enumerate(runs, 1):
        agent_ms, bare_ms = (1e3 * statistics.mean(times) for times in (run.agent, run.bare))
        table.add_row(
            str(number), str(len(run.agent)), f"{agent_ms:.1f}", f"{bare_ms:.1f}", f"{run.ratio:.3f}"
        )
        rows.append({"steps": len(run.agent), "agent_ms": agent_ms, "bare_ms": bare_ms, "ratio": run.ratio})
    ratios = [run.ratio for run in runs]
    figures = {
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    console.print(table)
    console.print("  ".join(f"{name} {value:.3f}" for name, value in figures.items()), highlight=False)
    record = {**figures, "machine": machine, "model": options.model, "r": RANK, "runs": rows}
    command.write_json(options.json, record)


if __name__ == "__main__":
    sys.exit(main())
