"""A merge rule of your own: no device moves the model further than the others do.

A rule is a class that derives from one in `coordinator/rules/`. Name it in the host's configuration:

    [federation]
    rule = "own_rule:EvenHanded"        # package.module:Class, importable where the coordinator runs

or let your package offer it under a short name, in its pyproject.toml:

    [project.entry-points."flexlora_edge.rules"]
    even_handed = "own_rule:EvenHanded"

Devices need none of its code. `python -m examples.own_rule` shows what it does to two changes, one of them
ten times as long.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from coordinator.rules.carry import Carry
from coordinator.rules.rule import Addends, Change, Merging
from edge_sdk.core.lora import LoraFactors


class EvenHanded(Carry):
    """G ← G + η Σ w_k m D_k / ‖D_k‖_F, with m = Σ w_k ‖D_k‖_F, module by module.

    Under `carry` what a device sends is what it changed, D_k. Each change is brought to the mean length m; a
    change of length 0 stays what it is.
    """

    def addends(self, merging: Merging) -> Addends:
        """Those of `carry`, of changes that are equally long."""
        norms = [change.factors.norm() for change in merging.changes]
        mean = sum(change.weight * norm for change, norm in zip(merging.changes, norms, strict=True))
        even = [
            replace(change, weight=change.weight * mean / norm if norm else change.weight)
            for change, norm in zip(merging.changes, norms, strict=True)
        ]
        return super().addends(replace(merging, changes=even))


def main() -> None:
    """Two devices change two entries of a 2 × 2 module: by 1, and by 10. The mean length is 5.5."""
    quiet = LoraFactors(np.array([[1.0], [0.0]]), np.array([[1.0, 0.0]]))
    loud = LoraFactors(np.array([[0.0], [10.0]]), np.array([[0.0, 1.0]]))
    merging = Merging(LoraFactors.empty(2, 2), [Change(0.5, quiet), Change(0.5, loud)])
    for rule in (Carry(), EvenHanded()):  # 0.5·1 and 0.5·10; then 0.5·5.5 twice
        changed = rule.next(merging, rank_cap=2).factors.product()
        print(f"{type(rule).__name__:<12}{changed[0, 0]:6.2f}{changed[1, 1]:6.2f}")


if __name__ == "__main__":
    main()
