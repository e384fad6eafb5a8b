"""Merge rules by name, whoever wrote them; and what devices start from under one.

A rule is a class that derives from `coordinator.rules.rule.Rule`. An installed package offers it under a name
in the entry-point group `flexlora_edge.rules`, as this one offers its own six; one that is only importable is
named `package.module:Class`. examples/own_rule.py is one of a screen.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping
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
    """The rule of this name, made once: they are stateless.

    Raises:
        InputError: nobody offers it, two packages do, it cannot be imported, or it is not a rule; says which
            names there are, or what it lacks.
    """
    offered = [point for point in metadata.entry_points(group=GROUP) if point.name == name]
    targets = sorted({point.value for point in offered})
    if len(targets) > 1:
        raise InputError(
            f"rule {name!r} is offered twice, as {' and as '.join(targets)}; name one of them so"
        )
    if not targets and ":" not in name:
        known = known_rules()
        if not known:
            raise InputError(f"rule {name!r} is not known: no installed package offers rules; {_INSTALL}")
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"rule {name!r} is not known; there are {', '.join(known)}, and package.module:Class names any "
            f"other{meant}"
        )
    return _made(name, _imported(name, targets[0] if targets else name))


def known_rules() -> list[str]:
    """The names that installed packages offer, sorted."""
    return sorted({point.name for point in metadata.entry_points(group=GROUP)})


class _ByName(Mapping[str, Rule]):
    """Rules by name, found when they are asked for. Iterates over the names that are offered."""

    def __getitem__(self, name: str) -> Rule:
        return rule_named(name)

    def __iter__(self) -> Iterator[str]:
        return iter(known_rules())

    def __len__(self) -> int:
        return len(known_rules())


RULES: Mapping[str, Rule] = _ByName()


def served(federation: Federation, version: int, module: str, stored: LoraFactors, rank: int) -> LoraFactors:
    """What a device of `rank` starts one module of `version` from, given its global factors.

    In the sparse warm-up these are columns that all devices share; then what the rule says. Either way all
    that was learnt is there at the rank cap.
    """
    if version < federation.training.sparse_versions:
        return serve_columns(stored, rank, f"{federation.id}/{module}")
    seed = f"{federation.id}/{version}/{module}"
    return rule_named(federation.rule).serve(stored, rank, federation.split, seed)


def _imported(name: str, target: str) -> object:
    """What `package.module:Class` names."""
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise InputError(f"rule {name!r} cannot be imported from {target}: {one_line(error)}") from error


def _made(name: str, found: object) -> Rule:
    """The rule, if it has all that a merge will ask of it: told at the start, not at the first merge."""
    if not inspect.isclass(found):
        raise InputError(
            f"rule {name!r} is a {type(found).__name__}; it must be a class that derives from Rule"
        )
    lacks = sorted(
        getattr(found, "__abstractmethods__", set()) | {m for m in _INTERFACE if not hasattr(found, m)}
    )
    if lacks or not issubclass(found, Rule):
        what = f"lacks {', '.join(lacks)}" if lacks else "does not derive from it"
        raise InputError(f"rule {name!r} is not a coordinator.rules.rule.Rule: {found.__name__} {what}")
    for method in _INTERFACE:
        wanted, has = (_parameters(kind, method) for kind in (Rule, found))
        if wanted != has:
            takes, should = ", ".join(has), ", ".join(wanted)
            raise InputError(f"rule {name!r}: {found.__name__}.{method} takes ({takes}), not ({should})")
    try:
        return found()
    except Exception as error:
        raise InputError(f"rule {name!r}: {found.__name__}() fails: {one_line(error)}") from error


_INTERFACE = [name for name, _ in inspect.getmembers(Rule, inspect.isfunction) if not name.startswith("_")]


def _parameters(kind: type, method: str) -> list[str]:
    return list(inspect.signature(getattr(kind, method)).parameters)[1:]
