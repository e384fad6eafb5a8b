"""What is looked at in an adapter before it is acknowledged: its form, its values, how much it changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.merging.admission import Admission, admit, measure
from coordinator.merging.norm_bound import NormBound
from coordinator.merging.reach import Reach, Sizes, fresh_sizes, frobenius, reach, sizes
from coordinator.rules.named import rule_named, served
from coordinator.storage.blobs import Blobs
from coordinator.storage.rows import StoredUpdate
from coordinator.storage.store import Store
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import AdapterError
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Assignment, Federation, Update

MOST_SIZES = 1 << 15  # kept: some versions of a large base, in a few MB


@dataclass(frozen=True)
class _Module:
    """One module of an update: what came, what its device began with, and how far training can get."""

    name: str
    factors: LoraFactors
    begun: LoraFactors
    reach: Reach


class Examination:
    """Examines uploads of a federation. For worker threads.

    `admission` and `learnt`: None under differential privacy, where no update may tell how another is
    treated.
    """

    def __init__(
        self,
        federation: Federation,
        store: Store,
        blobs: Blobs,
        admission: Admission | None,
        learnt: NormBound | None,
    ) -> None:
        self._federation, self._store, self._blobs = federation, store, blobs
        self._rule, self._admission, self._learnt = rule_named(federation.rule), admission, learnt
        self._sizes: dict[tuple[int, str, int], Sizes] = {}  # version, module, rank: of what is served

    def examine(
        self, device: str, assignment: Assignment, update: Update, path: Path, most_bytes: int
    ) -> StoredUpdate:
        """Shapes, dtypes and values of a whole file, and the norm of what the device changed.

        Returns:
            What to keep: the update, its norm, and how much of it is merged.

        Raises:
            AdapterError, TooLarge: it cannot be merged; names tensor or module.
        """
        federation = self._federation
        file = codec.open_adapter(path, federation.base.modules, update.rank, federation.scaling, most_bytes)
        if not any(r == min(update.rank, *federation.base.modules[name]) for name, r in file.ranks.items()):
            raise AdapterError(f"no module has rank {update.rank}, which Update.rank says")
        # What a device says of itself weighs no more than what it was asked to do.
        most = update.steps * federation.training.batch
        update = replace(update, examples=min(update.examples, most))
        squares = []

        def changes() -> Iterator[tuple[str, LoraFactors]]:
            for module in self._modules(file, assignment):
                self._require_size(module)
                squares.append(module.reach.change**2)
                yield module.name, self._rule.change(module.factors, module.begun)

        norms = measure(changes())
        factor = admit(norms, self._limit(math.sqrt(sum(squares))), self._refuses())
        return StoredUpdate(assignment.id, device, assignment.version, update, factor, factor * norms.total)

    def norm_bound(self) -> float | None:
        """The learnt bound at present; None while too little is known."""
        return self._learnt.now() if self._learnt else None

    def _limit(self, change: float) -> float | None:
        """The longest change that is merged whole, given the reach of its training."""
        if self._admission is None:
            return None
        learnt = self.norm_bound()
        reached = self._admission.reach_factor * change
        return reached if learnt is None else min(reached, learnt)

    def _modules(self, file: codec.AdapterFile, assignment: Assignment) -> Iterator[_Module]:
        federation, rule, version = self._federation, self._rule, assignment.version
        stored = None if rule.carries else self._store.version(version)
        start = codec.open_own(self._blobs.path(stored.digest), federation.scaling) if stored else None
        moved = assignment.steps * federation.training.learning_rate_at(version)
        for name, factors in file.modules():
            nothing, shape, rank = LoraFactors.empty(*factors.shape), factors.shape, factors.rank
            if rule.carries:
                begun, known = nothing, fresh_sizes(shape, rank)
            else:
                own = start.module(name) if start else nothing
                begun = served(federation, version, name, own, rank)
                known = self._sizes_of(version, name, begun)
            found = reach(known, shape, rank, moved, federation.scaling)
            # What version 0 serves changes nothing: then the change is all that came.
            yield _Module(name, factors, begun if start else nothing, found)

    def _sizes_of(self, version: int, name: str, begun: LoraFactors) -> Sizes:
        """Of one module as a version serves it: the same for every device of a rank."""
        key = version, name, begun.rank
        if key not in self._sizes:
            if len(self._sizes) >= MOST_SIZES:
                self._sizes.clear()
            self._sizes[key] = sizes(begun)
        return self._sizes[key]

    def _require_size(self, module: _Module) -> None:
        """Where factors are averaged by themselves each of them counts, whatever their product is.

        Columns of B that cancel each other, or a large B beside a small A, pass every bound on the product.

        Raises:
            AdapterError: B or A is larger than training makes it.
        """
        if self._rule.sums_products or self._admission is None:
            return
        factor = self._admission.reach_factor
        for which, values, most in (
            ("B", module.factors.b, factor * module.reach.b),
            ("A", module.factors.a, factor * module.reach.a),
        ):
            size = frobenius(values)
            if not size <= most:
                raise AdapterError(
                    f"module {module.name}: {which} has norm {size:.3g}; training at this rate for so many "
                    f"steps stays below {most:.3g}, and this federation averages B and A by themselves"
                )

    def _refuses(self) -> bool:
        """Whether an update above the bound is refused.

        A change can be shortened only where products are summed: between two pairs of factors lie products
        that are longer than both.
        """
        refuses = self._admission is not None and self._admission.over_norm == "refuse"
        return refuses or not self._rule.sums_products
