"""How updates become the next global adapter: one rule a file, each a screen of pure code."""

from __future__ import annotations

from collections.abc import Mapping

from coordinator.rules.carry import Carry
from coordinator.rules.columns import serve_columns
from coordinator.rules.fedit import FedIt
from coordinator.rules.flexlora import FlexLora
from coordinator.rules.flora import Flora
from coordinator.rules.hetlora import HetLora
from coordinator.rules.innovation import Innovation
from coordinator.rules.rule import Change, Merged, Merging, Ranks, Rule, SumRule
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Federation, RuleName

RULES: Mapping[RuleName, Rule] = {
    "flexlora": FlexLora(),
    "innovation": Innovation(),
    "carry": Carry(),
    "fedit": FedIt(),
    "hetlora": HetLora(),
    "flora": Flora(),
}


def served(federation: Federation, version: int, module: str, stored: LoraFactors, rank: int) -> LoraFactors:
    """What a device of `rank` starts one module of `version` from, given its global factors.

    In the sparse warm-up these are columns that all devices share; then what the rule says. Either way all
    that was learnt is there at the rank cap.
    """
    if version < federation.training.sparse_versions:
        return serve_columns(stored, rank, f"{federation.id}/{module}")
    seed = f"{federation.id}/{version}/{module}"
    return RULES[federation.rule].serve(stored, rank, federation.split, seed)


__all__ = ["RULES", "Change", "Merged", "Merging", "Ranks", "Rule", "SumRule", "served"]
