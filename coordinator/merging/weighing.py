"""How a merge weighs its updates, and what it makes of the rule: one object for each way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np

from coordinator.merging.admission import Admission
from coordinator.merging.robust import gram, reweight
from coordinator.merging.sources import Sources
from coordinator.privacy.mechanism import Noise, NoisedSum, clip_factor, squared_norm_bound
from coordinator.rules.rule import Rule, SumRule
from edge_sdk.core.errors import AdapterError, BadUpdates, InternalError
from edge_sdk.core.lora import LoraFactors


class Weighing(ABC):
    """A way to weigh. Stateless."""

    @abstractmethod
    def weigh(self, sources: Sources) -> Sources:
        """The same files, their updates with the weights and factors that they are merged with."""

    def rule(self, rule: Rule) -> Rule:
        """What makes the next factors of a module from them."""
        return rule


class AsGiven(Weighing):
    """The engine's weights, and the factors that admission decided on."""

    def weigh(self, sources: Sources) -> Sources:
        """The same, unchanged."""
        return sources


@dataclass(frozen=True)
class Robust(Weighing):
    """Weights from the distances between the changes (`robust.py`), as `[admission] robust` names them."""

    admission: Admission

    def weigh(self, sources: Sources) -> Sources:
        """The updates with robust weights and factors: a pass of its own over the files, before the merge.

        Memory holds the changes of one module, and their (K, K) inner products.
        """
        whole = sources.whole()
        inner = np.zeros((len(sources.updates), len(sources.updates)))
        for name, shape in sorted(sources.federation.base.modules.items()):
            merging = whole.merging(name, shape, 1.0)
            inner += gram(
                [
                    sources.rule.change(c.factors, sources.begun(name, c, merging.starts))
                    for c in merging.changes
                ]
            )
        factors = np.array([addend.factor for addend, _ in sources.updates])
        weights = np.array([addend.weight for addend, _ in sources.updates])
        found = reweight(
            self.admission.robust, inner * np.outer(factors, factors), weights, self.admission.trimmed_share
        )
        merged = zip(sources.updates, found.weights.tolist(), (factors * found.factors).tolist(), strict=True)
        updates = [(replace(addend, weight=w, factor=f), file) for (addend, file), w, f in merged]
        return replace(sources, updates=updates)


@dataclass(frozen=True)
class Private(Weighing):
    """Changes clipped, and the sum noised, as differential privacy has it (`privacy/mechanism.py`)."""

    noise: Noise

    def weigh(self, sources: Sources) -> Sources:
        """The updates, each with the factor that brings its change down to the clip norm over all modules.

        The change is measured as it will be summed: less the components of the stored start, to the last bit.

        Raises:
            BadUpdates: a norm is not finite.
        """
        updates = []
        for addend, file in sources.updates:
            start, squared = sources.starts.get(addend.start.version), 0.0
            for name, factors in file.modules():
                stored = start.module(name) if start else LoraFactors.empty(*factors.shape)
                squared += squared_norm_bound(sources.rule.change(factors, stored.leading(factors.rank)))
            try:
                updates.append((replace(addend, factor=clip_factor(squared, self.noise.clip_norm)), file))
            except AdapterError as error:
                raise BadUpdates.of({addend.update: str(error)}) from error
        return replace(sources, updates=updates)

    def rule(self, rule: Rule) -> Rule:
        """The noised sum of the rule's addends.

        Raises:
            InternalError: the rule sums no products; settings refuse it before.
        """
        if not isinstance(rule, SumRule):
            raise InternalError(f"{type(rule).__name__} sums no products, which noise could be added to")
        return NoisedSum(rule, self.noise)


def weighing(admission: Admission, noise: Noise | None) -> Weighing:
    """The way that the host's choices come to."""
    if noise:
        return Private(noise)
    return AsGiven() if admission.robust == "none" else Robust(admission)
