"""Merge rules by name, whoever wrote them; and what devices start from under one.

A rule is a class that derives from `coordinator.rules.rule.Rule`. An installed package offers it under a name
in the entry-point group `flexlora_edge.rules`, as this one offers its own six; one that is only importable is
named `package.module:Class`. examples/own_rule.py is one of a screen.
"""

from __future__ import annotations

import difflib
import inspect
from functools import cache
from importlib import metadata

from coordinator.rules.columns import serve_columns
from coordinator.rules.rule import Rule
from edge_sdk.core.errors import InputError, one_line
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Federation

GROUP = "flexlora_edge.rules"
_INSTALL = "install flexlora-edge by pip, also where it runs from a checkout: `pip install -e .`"


@cache
def rule_named(name: str) -> Rule:
    """The rule of this name, made once: rules are stateless.

    Raises:
        InputError: nobody offers it, two packages do, it cannot be imported, or it is not a rule; says which
            names there are, or what it lacks.
    """
    offered = {point.value: point for point in metadata.entry_points(group=GROUP) if point.name == name}
    if len(offered) > 1:
        raise InputError(
            f"rule {name!r} is offered twice, as {' and as '.join(sorted(offered))}; name one of them so"
        )
    if not offered and ":" not in name:
        raise _unknown(name)
    point = next(iter(offered.values()), None) or metadata.EntryPoint(name, name, GROUP)
    try:
        found = point.load()
    except Exception as error:
        raise InputError(f"rule {name!r} cannot be imported from {point.value}: {one_line(error)}") from error
    return _made(name, found)


def known_rules() -> list[str]:
    """The names that installed packages offer, sorted."""
    return sorted({point.name for point in metadata.entry_points(group=GROUP)})


def served(federation: Federation, version: int, module: str, stored: LoraFactors, rank: int) -> LoraFactors:
    """What a device of `rank` starts one module of `version` from, given its global factors.

    In the sparse warm-up these are columns that all devices share; then what the rule says. Either way all
    that was learnt is there at the rank cap.
    """
    if version < federation.training.sparse_versions:
        return serve_columns(stored, rank, f"{federation.id}/{module}")
    seed = f"{federation.id}/{version}/{module}"
    return rule_named(federation.rule).serve(stored, rank, federation.split, seed)


def _unknown(name: str) -> InputError:
    """The error for a name that nobody offers."""
    known = known_rules()
    if not known:
        return InputError(f"rule {name!r} is not known: no installed package offers rules; {_INSTALL}")
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(
        f"rule {name!r} is not known; there are {', '.join(known)}, and package.module:Class names any "
        f"other{meant}"
    )


# --- whether it is a rule: told at the start, not at the first merge ------------------------------

_METHODS = [name for name, _ in inspect.getmembers(Rule, inspect.isfunction) if not name.startswith("_")]
_ABILITIES = [name for name, value in inspect.getmembers(Rule) if isinstance(value, bool)]


def _made(name: str, found: object) -> Rule:
    """The rule, if it has all that a merge will ask of it."""
    if not inspect.isclass(found):
        raise InputError(
            f"rule {name!r} is a {type(found).__name__}; it must be a class that derives from Rule"
        )
    missing = {method for method in _METHODS if not callable(getattr(found, method, None))}
    lacks = sorted(missing | getattr(found, "__abstractmethods__", set()))
    if lacks or not issubclass(found, Rule):
        what = f"lacks {', '.join(lacks)}" if lacks else "does not derive from it"
        raise InputError(f"rule {name!r} is not a coordinator.rules.rule.Rule: {found.__name__} {what}")
    try:
        rule = found()
    except Exception as error:
        raise InputError(f"rule {name!r}: {found.__name__}() fails: {one_line(error)}") from error
    for method in _METHODS:
        _require_callable(name, rule, method)
    for ability in _ABILITIES:
        if not isinstance(getattr(rule, ability), bool):
            raise InputError(f"rule {name!r}: {found.__name__}.{ability} must be True or False")
    return rule


def _require_callable(name: str, rule: Rule, method: str) -> None:
    """A method must take what `Rule`'s takes; it may take more."""
    given = list(inspect.signature(getattr(Rule, method)).parameters)[1:]
    takes = inspect.signature(getattr(rule, method))
    try:
        takes.bind(*given)
    except TypeError as error:
        where = f"{type(rule).__name__}.{method}"
        raise InputError(f"rule {name!r}: {where} takes {takes}, not ({', '.join(given)})") from error
