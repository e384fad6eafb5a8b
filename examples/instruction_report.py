"""What a run on Natural Instructions measured: the record, the tables, and whether anything was learnt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edge_sdk.core.choice.memory import human_bytes


@dataclass(frozen=True)
class Loss:
    """A client's mean loss per token of its held-out outputs: the base alone, then with the adapter.

    `tokens`: how many both are over.
    """

    client: int
    category: str
    task: int
    loss_before: float
    loss_after: float
    tokens: int


@dataclass(frozen=True)
class Participant(Loss):
    """A client that trained. `uploaded_bytes`: the factors of all its merged updates, as they travel."""

    name: str
    memory_bytes: int
    r: int
    updates: int
    mean_staleness: float
    uploaded_bytes: int


@dataclass(frozen=True)
class Report:
    """One run. `seconds` covers all of it, `training_s` the federation alone; `filter` is for people."""

    command: str
    machine: str
    base: dict[str, Any]
    filter: str
    clients: int
    eligible: int
    rule: str
    seed: int
    training: dict[str, Any]
    policy: dict[str, Any]
    devices: tuple[Participant, ...]
    unseen: dict[str, tuple[Loss, ...]]
    versions: int
    training_s: float
    seconds: float
    adapter_dir: str

    @property
    def all_unseen(self) -> list[Loss]:
        """The clients that took no part, of every group."""
        return [loss for group in self.unseen.values() for loss in group]

    @property
    def learnt(self) -> bool:
        """Whether the mean loss on clients that took no part fell."""
        before, after = means(self.all_unseen)
        return after < before

    def write(self, path: Path) -> None:
        """As JSON, with the means beside the clients that they are over."""
        record = dataclasses.asdict(self)
        groups = {"participants": self.devices, **self.unseen, "all unseen": tuple(self.all_unseen)}
        record["means"] = {name: _summary(losses) for name, losses in groups.items()}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def means(losses: Sequence[Loss]) -> tuple[float, float]:
    """Mean loss before and after over clients, each client counted once; nan of none."""
    if not losses:
        return float("nan"), float("nan")
    count = len(losses)
    return sum(x.loss_before for x in losses) / count, sum(x.loss_after for x in losses) / count


def fell(losses: Sequence[Loss]) -> int:
    """On how many clients the loss fell."""
    return sum(loss.loss_after < loss.loss_before for loss in losses)


def _summary(losses: Sequence[Loss]) -> dict[str, Any]:
    before, after = means(losses)
    return {"clients": len(losses), "loss_before": before, "loss_after": after, "fell": fell(losses)}


# --- tables --------------------------------------------------------------------------------------

COLUMNS = ("category", "task", "memory", "r", "updates", "staleness", "sent", "loss before", "after")


def _device_cells(device: Participant) -> list[str]:
    """A row of the table of participants."""
    return [
        device.category,
        str(device.task),
        human_bytes(device.memory_bytes),
        str(device.r),
        str(device.updates),
        f"{device.mean_staleness:.1f}",
        human_bytes(device.uploaded_bytes),
        f"{device.loss_before:.2f}",
        f"{device.loss_after:.2f}",
    ]


def _group_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Group, losses before and after, and on how many clients the loss fell."""
    groups: dict[str, Sequence[Loss]] = {
        "participants": report.devices,
        **{f"unseen, {name}": losses for name, losses in report.unseen.items() if losses},
        "all unseen": report.all_unseen,
    }
    rows = []
    for name, losses in groups.items():
        before, after = means(losses)
        rows.append((name, f"{before:.2f}", f"{after:.2f}", f"{fell(losses)} of {len(losses)}"))
    return rows


def show(report: Report, console: Console) -> None:
    """The closing tables."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "category" else "right", overflow="fold")
    for device in report.devices:
        table.add_row(*_device_cells(device))
    console.print(table)
    console.print()
    groups = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("mean over clients", "loss before", "after", "fell on"):
        groups.add_column(column, justify="left" if column == "mean over clients" else "right")
    for row in _group_rows(report):
        groups.add_row(*row)
    console.print(groups)
    console.print(f"\n{_closing(report)}", highlight=False)


def markdown(report: Report) -> str:
    """The same for a document: facts, then the two tables."""
    steps, batch = report.training["steps"], report.training["batch"]
    base, policy = report.base, report.policy
    facts = [
        f"command: `{report.command}`",
        f"machine: {report.machine}",
        f"base: `{base['model']}`, {base['loaded']}, fingerprint `{base['fingerprint'][:12]}`",
        f"clients: {report.eligible} of {report.clients} pass the filter: {report.filter}",
        f"rule `{report.rule}`, η = {policy['server_learning_rate']:g}, seed {report.seed}",
        f"a version every {policy['buffer_size']} updates",
        f"an assignment: {steps} steps of {batch} examples at rate {report.training['learning_rate']:g}",
        _closing(report),
    ]
    devices = [list(COLUMNS), _rule(len(COLUMNS)), *map(_device_cells, report.devices)]
    groups = [["mean over clients", "loss before", "after", "fell on"], _rule(4)]
    groups += map(list, _group_rows(report))
    return "\n\n".join(["\n".join(f"- {fact}" for fact in facts), _piped(devices), _piped(groups)])


def _rule(columns: int) -> list[str]:
    """The line under a heading: the first column to the left, the others to the right."""
    return ["---", *["---:"] * (columns - 1)]


def _piped(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _closing(report: Report) -> str:
    """How much was done, in one sentence."""
    updates = sum(device.updates for device in report.devices)
    sent = sum(device.uploaded_bytes for device in report.devices)
    return (
        f"{updates} updates ({human_bytes(sent)}) in {report.versions} versions; the federation ran "
        f"{report.training_s:.0f} s, all of it took {report.seconds:.0f} s"
    )
