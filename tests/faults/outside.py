"""What anybody can see of a data folder while no process is at it: whether all that was promised holds."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.core.adapter_file import codec
from tests.coordinator.devices import SCALING


def rows(data: Path, query: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(data / "coordinator.sqlite")) as database:
        return database.execute(query).fetchall()


def blob(data: Path, digest: str) -> Path:
    return data / "blobs" / digest[:2] / digest


def temporaries(data: Path) -> list[Path]:
    """Files that were being written, of any kind."""
    return [path for path in data.rglob(".*") if path.is_file()]


@dataclass
class Seen:
    """The history of a folder so far: what was there once stays."""

    versions: dict[int, str] = field(default_factory=dict)
    merged: dict[str, int] = field(default_factory=dict)

    def check(self, data: Path, acknowledged: Iterable[str]) -> None:
        """All that holds whenever a coordinator is not running, however it ended."""
        assert rows(data, "PRAGMA integrity_check") == [("ok",)]
        self._check_versions(data)
        self._check_updates(data, set(acknowledged))
        assert len(temporaries(data)) <= 12  # what the last kill left; the start after it removes that

    def _check_versions(self, data: Path) -> None:
        found = rows(data, "SELECT version, digest, collected FROM versions ORDER BY version")
        assert [version for version, _, _ in found] == list(range(1, len(found) + 1))
        now = {version: digest for version, digest, _ in found}
        assert self.versions.items() <= now.items()  # versions only grow, and stay what they are
        self.versions = now
        for version, digest, collected in found:
            if not collected:
                assert codec.sha256_file(blob(data, digest)) == digest
                for _ in codec.open_own(blob(data, digest), SCALING).modules():
                    pass
            weights = rows(data, f"SELECT weight FROM updates WHERE merged_version = {version}")
            assert sum(weight for (weight,) in weights) == pytest.approx(1.0)

    def _check_updates(self, data: Path, acknowledged: set[str]) -> None:
        """Each is in one version, in the buffer with its file whole, or rejected with a reason."""
        found = rows(data, "SELECT assignment, digest, merged_version, rejected FROM updates")
        ids = [id for id, _, _, _ in found]
        assert len(ids) == len(set(ids))
        assert acknowledged <= set(ids), acknowledged - set(ids)
        merged = {id: version for id, _, version, _ in found if version is not None}
        assert self.merged.items() <= merged.items()  # nothing leaves a version or moves to another
        self.merged = merged
        assert set(merged.values()) == set(self.versions)
        for id, digest, version, rejected in found:
            assert version is None or rejected is None, id
            assert rejected is None or len(rejected) > 10, id
            if version is None and rejected is None:
                assert codec.sha256_file(blob(data, digest)) == digest, id
