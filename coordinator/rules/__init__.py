"""How updates become the next global adapter: one rule a file, each a screen of pure code."""

from __future__ import annotations

from collections.abc import Mapping

from coordinator.rules.carry import Carry
from coordinator.rules.fedit import FedIt
from coordinator.rules.flexlora import FlexLora
from coordinator.rules.flora import Flora
from coordinator.rules.hetlora import HetLora
from coordinator.rules.innovation import Innovation
from coordinator.rules.rule import Change, Merged, Merging, Ranks, Rule
from edge_sdk.core.messages import RuleName

RULES: Mapping[RuleName, Rule] = {
    "flexlora": FlexLora(),
    "innovation": Innovation(),
    "carry": Carry(),
    "fedit": FedIt(),
    "hetlora": HetLora(),
    "flora": Flora(),
}

__all__ = ["RULES", "Change", "Merged", "Merging", "Ranks", "Rule"]
