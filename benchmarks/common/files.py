"""Versions and updates of a federation in one process as files, merged as a coordinator merges its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.federation import SCALING
from coordinator.merging.admission import Admission
from coordinator.merging.aggregation import aggregate
from coordinator.merging.sources import Addend, StartVersion
from coordinator.merging.weighing import weighing
from coordinator.storage.blobs import Blobs
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.adapter_file.dtypes import WireDtype
from edge_sdk.core.lora import Adapter
from edge_sdk.core.messages import Federation


class Files:
    """The files of a federation.

    Args:
        federation: whose rule merges.
        folder: where they lie.
    """

    def __init__(self, federation: Federation, folder: Path) -> None:
        self.federation = federation
        self._blobs = Blobs(folder)

    def keep(self, adapter: Adapter, dtype: WireDtype = "float32") -> Path:
        """Write what a device sends."""
        return self._blobs.path(self._blobs.write([codec.encode(adapter, SCALING, dtype)]))

    def merge(
        self,
        current: StartVersion,
        addends: Sequence[Addend],
        eta: float = 1.0,
        admission: Admission | None = None,
    ) -> tuple[StartVersion, int]:
        """The version after `current`, and its live rank."""
        outcome = aggregate(
            self.federation,
            eta,
            current,
            addends,
            self._blobs.write,
            weighing(admission or Admission(), None),
        )
        return StartVersion(current.version + 1, self._blobs.path(outcome.digest)), outcome.rank

    def adapter(self, version: StartVersion) -> Adapter | None:
        """The global adapter of a version; None for version 0."""
        return dict(codec.open_own(version.path, SCALING).modules()) if version.path else None
