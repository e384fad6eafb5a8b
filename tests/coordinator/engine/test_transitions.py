"""The tables are complete: no event without a row, no row that cannot be reached, nothing unused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from coordinator.engine import actions, conditions
from coordinator.engine.engine import Engine
from coordinator.engine.events import (
    Asked,
    DeviceEvent,
    Done,
    Effect,
    Expired,
    Grant,
    Merged,
    MergeFailed,
    Offered,
    Restarted,
    RevertWanted,
    Stored,
    Tick,
)
from coordinator.engine.policy import Policy
from coordinator.engine.state import MergePhase, WorkPhase
from coordinator.engine.transitions import VERSION, WORK, OnEvent, Pass, Row
from edge_sdk.core.errors import InternalError
from tests.coordinator.engine.effects import said

Table = tuple[OnEvent[Any], ...]
ROWS: tuple[Any, ...] = tuple(row for one in (*WORK, *VERSION) for row in one.rows)
PLACES = [
    *((WORK, phase, event) for phase in get_args(WorkPhase) for event in get_args(DeviceEvent)),
    (WORK, "training", Tick),
    *((VERSION, phase, event) for phase in get_args(MergePhase) for event in (Tick, Stored, RevertWanted)),
    *((VERSION, "merging", event) for event in (Merged, MergeFailed)),
    (VERSION, "collecting", Restarted),
]


def rows_of(table: Table, phase: str, event: type[Any]) -> list[Any]:
    return [row for one in table if one.event is event for row in one.rows if phase in row.phases]


@pytest.mark.parametrize(("table", "phase", "event"), PLACES)
def test_every_event_has_a_row_for_all_other_cases_and_none_behind_it(
    table: Table, phase: str, event: type[Any]
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
    tables: tuple[Table, ...] = (WORK, VERSION)
    found = {
        (id(table), phase, one.event)
        for table in tables
        for one in table
        for row in one.rows
        for phase in row.phases
    }
    assert found == wanted


@pytest.mark.parametrize("table", [WORK, VERSION])
def test_all_rows_of_an_event_stand_together(table: Table) -> None:
    events = [one.event for one in table]
    assert len(set(events)) == len(events)


def answers_of(annotation: Any) -> set[Any]:
    """`Grant | Wait` -> {Grant, Wait}."""
    return set(get_args(annotation)) or {annotation}


@pytest.mark.parametrize("one", WORK, ids=lambda one: one.event.__name__)
def test_an_event_is_answered_with_what_it_says(one: OnEvent[Any]) -> None:
    """`Engine.handle` promises the answer in an event's own base class; here its rows keep the promise."""
    (base,) = one.event.__orig_bases__  # type: ignore[attr-defined]
    (promised,) = get_args(base)
    given = [get_type_hints(row.do)["return"] for row in one.rows if isinstance(row, Row)]
    assert {get_origin(kind) for kind in given} == {Done}
    assert set().union(*(answers_of(get_args(kind)[0]) for kind in given)) == answers_of(promised)


def test_what_becomes_of_a_version_answers_nobody() -> None:
    returned = {get_type_hints(row.do)["return"] for one in VERSION for row in one.rows}
    assert returned == {Done[None], tuple[Effect, ...]}


def test_the_answer_and_the_effects_are_different_things() -> None:
    engine = Engine(Policy(lease_s=10.0))
    first = engine.handle(Asked("d", 4, "a"), 0.0)
    assert isinstance(first.answer, Grant)
    assert first.effects == ()
    again = engine.handle(Asked("d", 2, "b"), 1.0)  # other work: the old lease is over
    assert isinstance(again.answer, Grant)
    assert again.effects == (Expired(first.answer.lease),)


def test_a_row_that_gives_the_event_on_leads_to_another_phase() -> None:
    """Or it would be taken for ever."""
    tables: tuple[Table, ...] = (WORK, VERSION)
    passes = [(t, one.event, row) for t in tables for one in t for row in one.rows if isinstance(row, Pass)]
    assert passes
    for table, event, row in passes:
        assert row.to not in row.phases
        following = rows_of(table, row.to, event)
        assert following
        assert not any(isinstance(other, Pass) for other in following)


def of_a_situation(module: ModuleType) -> Iterator[str]:
    """Functions that a row may name."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        parameters = list(inspect.signature(function).parameters)
        if function.__module__ == module.__name__ and parameters == ["at"] and not name.startswith("_"):
            yield name


def test_every_condition_and_every_action_is_in_a_row() -> None:
    assert set(of_a_situation(conditions)) == {row.when.__name__ for row in ROWS if row.when}
    assert set(of_a_situation(actions)) == {row.do.__name__ for row in ROWS}


def test_what_cannot_happen_says_so() -> None:
    engine = Engine(Policy())
    with pytest.raises(InternalError, match="Merged cannot happen while collecting"):
        said(engine, Merged(1, 4), 0.0)
    with pytest.raises(InternalError, match="MergeFailed cannot happen while collecting"):
        said(engine, MergeFailed(), 0.0)


def test_looking_a_device_up_is_no_event_of_it() -> None:
    """Events of the federation leave no seat behind."""
    engine = Engine(Policy(buffer_size=1))
    said(engine, Restarted(), 0.0)
    said(engine, Tick(), 1.0)
    assert engine.state.seats == {}
    said(engine, Offered("d", "a", 0), 2.0)
    assert set(engine.state.seats) == {"d"}
