"""Each error survives the way through a problem document."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge_sdk.core import errors
from edge_sdk.core.errors import EdgeError, InternalError, TheirFault, from_problem, subclasses

ALL = subclasses(EdgeError)


def problem(error: EdgeError) -> dict[str, Any]:
    document = {"type": "about:blank", "title": error.title, "status": error.status, "detail": str(error)}
    return dict(json.loads(json.dumps(document | error.details)))


def test_every_class_has_its_own_title() -> None:
    assert len({kind.title for kind in ALL}) == len(ALL)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__
    for kind in ALL:
        line = next(line for line in errors.__doc__.splitlines() if kind.__name__ in line.split())
        if str(kind.status) not in line:
            assert kind.__subclasses__(), f"{kind.__name__} answers {kind.status}, its line says otherwise"


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_class_comes_back(kind: type[EdgeError]) -> None:
    back = from_problem(problem(kind("the layer is missing", current_version=7, where=["x"])))
    assert type(back) is kind
    assert str(back) == "the layer is missing"
    assert back.details == {"current_version": 7, "where": ["x"]}


@pytest.mark.parametrize("kind", subclasses(TheirFault), ids=lambda kind: kind.__name__)
def test_their_fault_is_a_4xx(kind: type[EdgeError]) -> None:
    assert 400 <= kind.status < 500


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        ({"title": "teapot", "status": 418, "detail": "short and stout"}, TheirFault),
        ({"title": "Bad Gateway", "status": 502}, InternalError),
        ({}, InternalError),
        ({"status": "four hundred"}, InternalError),
        ({"status": None}, InternalError),
    ],
)
def test_a_problem_of_somebody_else(document: dict[str, Any], kind: type[EdgeError]) -> None:
    back = from_problem(document)
    assert type(back) is kind
    assert str(back) == document.get("detail", "no detail given")
