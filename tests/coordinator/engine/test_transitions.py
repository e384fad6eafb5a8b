"""The tables are complete: no event without a row, no row that cannot be reached, nothing unused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, get_args

import pytest

from coordinator.engine import actions, conditions
from coordinator.engine.engine import Engine
from coordinator.engine.events import DeviceEvent, Merged, MergeFailed, Offered, Restarted, Stored, Tick
from coordinator.engine.policy import Policy
from coordinator.engine.state import MergePhase, WorkPhase
from coordinator.engine.transitions import VERSION, WORK
from edge_sdk.core.errors import InternalError

ROWS: tuple[Any, ...] = (*WORK, *VERSION)
PLACES = [
    *((WORK, phase, event) for phase in get_args(WorkPhase) for event in get_args(DeviceEvent)),
    (WORK, "training", Tick),
    *((VERSION, phase, event) for phase in get_args(MergePhase) for event in (Tick, Stored)),
    *((VERSION, "merging", event) for event in (Merged, MergeFailed)),
    (VERSION, "collecting", Restarted),
]


def rows_of(table: Sequence[Any], phase: str, event: type[Any]) -> list[Any]:
    return [row for row in table if phase in row.phases and row.event is event]


@pytest.mark.parametrize(("table", "phase", "event"), PLACES)
def test_every_event_has_a_row_for_all_other_cases_and_none_behind_it(
    table: Sequence[Any], phase: str, event: type[Any]
) -> None:
    rows = rows_of(table, phase, event)
    assert rows
    always = conditions.other_work if phase == "idle" else None  # an idle device has no work in hand
    assert rows[-1].when in (None, always)
    assert all(row.when is not None for row in rows[:-1])
    asked = [row.when for row in rows]
    assert len(set(asked)) == len(asked)  # a question that was answered no is not asked again


def test_the_tables_have_no_other_rows() -> None:
    wanted = {(id(table), phase, event) for table, phase, event in PLACES}
    found = {(id(t), phase, row.event) for t in (WORK, VERSION) for row in t for phase in row.phases}
    assert found == wanted


def test_a_row_that_gives_the_event_on_leads_to_another_phase() -> None:
    """Or it would be taken for ever."""
    for row in ROWS:
        if row.again:
            assert row.to is not None
            assert row.to not in row.phases
            following = rows_of(WORK if row in WORK else VERSION, row.to, row.event)
            assert following
            assert not any(other.again for other in following)


def of_a_situation(module: ModuleType) -> Iterator[str]:
    """Functions that a row may name."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        parameters = list(inspect.signature(function).parameters)
        if function.__module__ == module.__name__ and parameters == ["at"] and not name.startswith("_"):
            yield name


def test_every_condition_and_every_action_is_in_a_row() -> None:
    assert set(of_a_situation(conditions)) == {row.when.__name__ for row in ROWS if row.when}
    parts = {"ready"}  # a part of others
    assert set(of_a_situation(actions)) - parts == {row.do.__name__ for row in ROWS}


def test_what_cannot_happen_says_so() -> None:
    engine = Engine(Policy())
    with pytest.raises(InternalError, match="Merged cannot happen while collecting"):
        engine.handle(Merged(1, 4), 0.0)
    with pytest.raises(InternalError, match="MergeFailed cannot happen while collecting"):
        engine.handle(MergeFailed(), 0.0)


def test_looking_a_device_up_is_no_event_of_it() -> None:
    """Events of the federation leave no seat behind."""
    engine = Engine(Policy(buffer_size=1))
    engine.handle(Restarted(), 0.0)
    engine.handle(Tick(), 1.0)
    assert engine.state.seats == {}
    engine.handle(Offered("d", "a", 0), 2.0)
    assert set(engine.state.seats) == {"d"}
