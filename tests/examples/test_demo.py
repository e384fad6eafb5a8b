"""The parts of the demonstration that need no federation."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from edge_sdk.core.choice.memory import ACCELERATOR, CPU, Placement
from edge_sdk.core.choice.model_facts import facts_from_config
from edge_sdk.core.choice.rank import Carry, Device, Limits, choose
from edge_sdk.core.choice.setting import Ranks
from edge_sdk.model import base_model
from edge_sdk.model.files import read_config, resolve
from examples import demo


def change(before: float, after: float) -> dict[str, float]:
    return {"loss_before": 10.5, "loss_after": 0.25, "exact_match_before": before, "exact_match_after": after}


def report(*rises: float) -> dict[str, Any]:
    devices = [
        {
            "name": "workstation",
            "profile": "workstation-64gb",
            "memory_bytes": 121_000_000,
            "r": 16,
            "updates": 128,
            "mean_staleness": 12.5,
            "own": change(0.0, 1.0),
            "unseen": change(0.25, 0.25 + rise),
        }
        for rise in rises
    ]
    return {"devices": devices, "versions": 30, "seconds": 228.0, "adapter_dir": "runs/demo/adapter"}


def test_the_rise_is_the_mean_over_devices() -> None:
    assert demo.mean_rise(report(0.5, 0.25), "unseen") == pytest.approx(0.375)
    assert demo.mean_rise(report(0.5, 0.25), "own") == 1.0


def test_the_closing_table_fits_80_columns_uncut() -> None:
    text = io.StringIO()
    demo.show(report(0.5, -0.25), Console(file=text, width=80))
    assert "workstation 121 MB 16   128   12.5 0.00→1.00 10.5→0.25 0.25→0.75 10.5→0.25" in text.getvalue()
    assert "…" not in text.getvalue()


@pytest.mark.parametrize("placement", [CPU, replace(CPU, compute_bytes=2), ACCELERATOR])
@pytest.mark.parametrize("rule", ["carry", "flexlora"])
def test_the_cast_chooses_different_ranks_from_its_budgets(
    rule: str, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the demonstration runs."""
    monkeypatch.setattr(base_model, "placement", lambda *_: placement)
    base = base_model.describe("tiny")
    facts = facts_from_config(read_config(resolve("tiny")), base.modules)
    chosen = [
        choose(
            facts,
            demo.TRAINING,
            [Ranks.uniform(rank) for rank in demo.LADDER],
            Carry(demo.RANK_CAP if rule == "carry" else 0),
            Limits(demo.budget_bytes(household.profile, rule)),
            Device(placement),
        )
        for household in demo.CAST
    ]
    assert [found.rank for found in chosen] == [2, 4, 8, 8, 8, 16]
    # Nobody gives anything up for it.
    assert {found.setting.micro_batch for found in chosen} == {demo.TRAINING.batch}
    assert not any(found.setting.checkpointing for found in chosen)
    assert {found.setting.carry_rank for found in chosen} == {demo.RANK_CAP if rule == "carry" else 0}
