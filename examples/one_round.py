"""FlexLoRA on one page: three devices of different rank, two versions, numbers to check by hand.

    python -m examples.one_round

One module of 4 × 4 weights stands for a model, and every update is diagonal: its singular values are the
numbers on the diagonal, and a weighted sum adds them place by place.
"""

from __future__ import annotations

import numpy as np

from coordinator.engine.events import Buffered
from coordinator.engine.weights import by_examples
from coordinator.rules.flexlora import FlexLora
from coordinator.rules.rule import Change, Merging
from edge_sdk.core.lora import LoraFactors

SIZE, RANK_CAP = 4, 3  # the global adapter keeps three of four components
EXAMPLES = {"phone": 10, "laptop": 10, "desktop": 20}  # so they count 1/4, 1/4 and 1/2
RANKS = {"phone": 1, "laptop": 2, "desktop": 4}
FIRST_WORK = {"phone": [8], "laptop": [8, 4], "desktop": [8, 6, 4, 2]}


def diagonal(values: list[int]) -> LoraFactors:
    """B (4, r) and A (r, 4) whose product has these values on its diagonal."""
    a = np.eye(len(values), SIZE, dtype=np.float32)
    return LoraFactors(a.T * np.float32(values), a)


def shown(factors: LoraFactors) -> str:
    """The singular values of the product."""
    sigmas = np.linalg.svd(factors.product(), compute_uv=False)[: factors.rank]
    return " ".join(f"{sigma:g}" for sigma in sigmas.round(3))


def main() -> None:
    """Two rounds; after each, what every device goes on from."""
    rule, current = FlexLora(), LoraFactors.empty(SIZE, SIZE)
    updates = {device: diagonal(values) for device, values in FIRST_WORK.items()}
    for version in (1, 2):
        buffer = [Buffered(name, name, version - 1, EXAMPLES[name]) for name in updates]
        weighted = by_examples(buffer, version - 1, "polynomial", max_examples=1000)  # none is stale here
        changes = [Change(weight, updates[update.device]) for update, weight, _ in weighted]
        merged = rule.next(Merging(current, changes, version - 1), RANK_CAP)
        current = merged.factors
        # 1: 8/4 + 8/4 + 8/2 = 8, 4/4 + 6/2 = 4, 4/2 = 2, and 2/2 = 1 is dropped: 1² of 8² + 4² + 2² + 1².
        # 2: 16/4 + 16/4 + 16/2 = 16, 8/4 + 8/2 = 6 (not 8: the phone has no second one), 4/2 = 2.
        print(f"version {version}: {shown(current)}   dropped {merged.discarded_energy / merged.energy:.2%}")
        for device, rank in RANKS.items():  # each is served as many components as it can train
            start = rule.serve(current, rank, "balanced", seed=f"{version}/{device}")
            print(f"  {device:7} of rank {rank} starts from {shown(start)}")
            updates[device] = LoraFactors(2 * start.b, start.a)  # and its training doubles all of them


if __name__ == "__main__":
    main()
