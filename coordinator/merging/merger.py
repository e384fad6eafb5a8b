"""A merge on disk: find the files that it needs, aggregate them, and publish the version."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from coordinator.engine.events import Merge, Revert
from coordinator.merging.admission import Admission
from coordinator.merging.aggregation import Outcome, aggregate
from coordinator.merging.norm_bound import NormBound
from coordinator.merging.sources import Addend, StartVersion, faults
from coordinator.merging.weighing import weighing
from coordinator.privacy.mechanism import Noise
from coordinator.rules.named import rule_named
from coordinator.storage.blobs import Blobs
from coordinator.storage.rows import StoredUpdate, Version
from coordinator.storage.store import Store
from edge_sdk.core.adapter_file.codec import encode_chunks
from edge_sdk.core.errors import BadUpdates, InputError, NotFound
from edge_sdk.core.flexlora import Decompose
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Federation
from edge_sdk.core.svd.decompose import decompose

Prepare = Callable[[int, str, int], None]
"""Looks at a version before it is published: its number, the digest of its adapter, its live rank."""


def unprepared(version: int, digest: str, live_rank: int) -> None:
    """Nothing."""


class Merger:
    """Does what the engine's Merge says. For a worker thread.

    `eta`: the server's learning rate. `noise`: None without differential privacy. `by` decomposes sums.
    `learnt` is the bound that uploads are held to as well; None with differential privacy.
    """

    def __init__(
        self,
        federation: Federation,
        store: Store,
        blobs: Blobs,
        admission: Admission | None = None,
        eta: float = 1.0,
        noise: Noise | None = None,
        by: Decompose = decompose,
    ) -> None:
        self._federation, self._store, self._blobs = federation, store, blobs
        self._rule = rule_named(federation.rule)
        self._admission = admission or Admission()
        # A bound learnt from other devices' updates would say something of these, which privacy forbids.
        self.learnt = None if noise else NormBound(federation, store, self._admission)
        self._eta, self._noise, self._by = eta, noise, by

    def make(self, effect: Merge | Revert, prepare: Prepare = unprepared) -> Version:
        """Do either, and publish; after this returns the version is durable.

        `prepare` is called before that, with the version's number, the digest of its adapter, and its live
        rank; what it raises keeps the version from being published.
        """
        if isinstance(effect, Merge):
            return self.merge(effect, prepare)
        return self.revert(effect, prepare)

    def merge(self, effect: Merge, prepare: Prepare = unprepared) -> Version:
        """Aggregate and publish; see `make`.

        Raises:
            BadUpdates: some are not what was acknowledged, all of these; nothing was published.
            InternalError: the file of a published version is damaged.
        """
        records = {stored.id: stored for stored in self._store.unmerged()}
        limit = self.learnt.now() if self.learnt else None
        addends = [
            self._addend(self._clipped(records[b.update], limit), weight) for b, weight, _ in effect.weights
        ]
        base = StartVersion(effect.version - 1, self._version(effect.version - 1))
        self._check(addends, base)
        how = weighing(self._admission, self._noise)
        with self._blobs.keeping() as write:  # until its row is there
            outcome = aggregate(self._federation, self._eta, base, addends, write, how, self._by)
            prepare(effect.version, outcome.digest, outcome.rank)
            version = _version(effect.version, outcome, self._noise, limit)
            merged = zip(effect.weights, outcome.weights, strict=True)
            self._store.publish(version, [(b.update, weight, tau) for (b, _, tau), weight in merged])
        if self.learnt:
            self.learnt.published(limit)
        return version

    def revert(self, effect: Revert, prepare: Prepare = unprepared) -> Version:
        """Publish a version with the content of an older one; see `make`.

        Raises:
            InputError: the older version cannot be had.
        """
        newest, nothing = self._store.newest(), effect.to == 0
        old = newest if nothing else self._store.version(effect.to)
        if old is None or old.version < effect.to or (old.collected and not nothing):
            raise InputError(f"version {effect.to} cannot be gone back to: it is not there, or was collected")
        with self._blobs.keeping() as write:
            if nothing:
                content = replace(old, digest=write(self._nothing()), rank=0, energy=0.0, norm_bound=None)
                content = replace(content, discarded_energy=0.0)
            else:
                self._blobs.require_published(old.digest, effect.to)
                content = old
            version = replace(
                content,
                version=effect.version,
                published_at=time.time(),
                reverts_to=effect.to,
                collected=False,
            )
            prepare(version.version, version.digest, version.rank)
            self._store.publish_revert(version)
        if self.learnt:
            self.learnt.published(version.norm_bound)
        return version

    def _nothing(self) -> Iterator[bytes]:
        """An adapter that changes nothing, as version 0 does: one component of zeros."""
        shapes = self._federation.base.modules
        zeros = (
            (n, LoraFactors(np.zeros((out, 1), np.float32), np.zeros((1, inp), np.float32)))
            for n, (out, inp) in sorted(shapes.items())
        )
        return encode_chunks(shapes, dict.fromkeys(shapes, 1), self._federation.scaling, zeros)

    def _check(self, addends: Sequence[Addend], base: StartVersion) -> None:
        """Read every file once for its digest: a flipped bit in a value would be merged like any other value.

        What an update holds was checked when it came in; so an intact file needs no second look.
        """
        for start in {base, *(addend.start for addend in addends)}:
            if start.path:
                self._blobs.require_published(start.path.name, start.version)
        changed = [addend for addend in addends if not self._blobs.is_intact(addend.path.name)]
        if changed:
            found = faults(self._federation, changed)
            plain = "its file is not what was acknowledged"
            raise BadUpdates.of({a.update: found.get(a.update, plain) for a in changed})

    def _clipped(self, stored: StoredUpdate, limit: float | None) -> StoredUpdate:
        """The update with what is left of its change where a bound that it came before is exceeded.

        The first updates of a federation are let in without one; by the time that they are merged they may be
        enough to learn it from.
        """
        if limit is None or stored.norm is None or stored.norm <= limit or not self._rule.sums_products:
            return stored
        shorter = replace(stored, factor=stored.factor * limit / stored.norm, norm=limit)
        self._store.clip(shorter)
        return shorter

    def _addend(self, stored: StoredUpdate, weight: float) -> Addend:
        """An update on disk; with what it was trained from where the rule cannot do without."""
        assignment = self._store.assignment(stored.id, stored.device)
        if assignment is None:
            raise NotFound(f"update {stored.id} has no assignment of device {stored.device}")
        path, rank = self._blobs.path(stored.update.digest), stored.update.rank
        version = self._store.version(stored.version)
        live = version.rank if version else 0
        measured = stored.factor < 1.0 or self._admission.robust != "none"
        needed = self._rule.needs_start(rank, assignment.carry_rank, live)
        needed = needed or (measured and not self._rule.carries)
        start = StartVersion(stored.version, self._version(stored.version) if needed and live > 0 else None)
        return Addend(stored.id, weight, path, rank, start, assignment.carry_rank, stored.factor)

    def _version(self, number: int) -> Path | None:
        stored = self._store.version(number)
        return self._blobs.path(stored.digest) if stored else None


def _version(number: int, outcome: Outcome, noise: Noise | None, norm_bound: float | None) -> Version:
    """The row of a version that was just written."""
    return Version(
        number,
        outcome.digest,
        outcome.rank,
        outcome.energy,
        outcome.discarded_energy,
        time.time(),
        noise.multiplier if noise else 0.0,
        noise.clip_norm if noise else 0.0,
        norm_bound,
    )
