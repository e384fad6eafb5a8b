"""What the coordinator must remember, in SQLite. The one place that knows the schema.

Write-ahead log with full synchronous commits: when a call that writes returns, the row is on disk. Blobs come
first and rows second (see blobs.py), so that a row never names bytes that are not there. Nothing above this
module knows that it is SQLite; another database goes behind the same methods.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sdk.core.errors import InputError, ProtocolError, StaleUpdate
from edge_sdk.core.messages import Assignment, Update
from edge_sdk.core.records import from_json, to_json

MIGRATIONS = [
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE devices (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, credential_hash TEXT NOT NULL UNIQUE,
        profile TEXT NOT NULL, rank INTEGER NOT NULL DEFAULT 0, joined_at REAL NOT NULL,
        revoked INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE TABLE assignments (
        id TEXT PRIMARY KEY, device TEXT NOT NULL REFERENCES devices(id), version INTEGER NOT NULL,
        rank INTEGER NOT NULL, record TEXT NOT NULL, granted_at REAL NOT NULL, open INTEGER NOT NULL DEFAULT 1
    ) STRICT;
    CREATE TABLE updates (
        assignment TEXT PRIMARY KEY REFERENCES assignments(id), device TEXT NOT NULL,
        version INTEGER NOT NULL, record TEXT NOT NULL, digest TEXT NOT NULL, received_at REAL NOT NULL,
        merged_version INTEGER, weight REAL, staleness INTEGER, rejected TEXT
    ) STRICT;
    CREATE TABLE versions (
        version INTEGER PRIMARY KEY, digest TEXT NOT NULL, rank INTEGER NOT NULL, energy REAL NOT NULL,
        discarded_energy REAL NOT NULL, published_at REAL NOT NULL
    ) STRICT;
    CREATE INDEX updates_unmerged ON updates(received_at) WHERE merged_version IS NULL AND rejected IS NULL;
    CREATE INDEX assignments_open ON assignments(device) WHERE open = 1;
    """,
    # factor: how much of what a device changed is merged. norm: of that; NULL for updates from before.
    """
    ALTER TABLE updates ADD COLUMN norm REAL;
    ALTER TABLE updates ADD COLUMN factor REAL NOT NULL DEFAULT 1.0;
    ALTER TABLE devices ADD COLUMN refused INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX updates_norms ON updates(received_at) WHERE norm IS NOT NULL AND rejected IS NULL;
    """,
    # What differential privacy a version was published with; 0 without.
    """
    ALTER TABLE versions ADD COLUMN noise_multiplier REAL NOT NULL DEFAULT 0;
    ALTER TABLE versions ADD COLUMN clip_norm REAL NOT NULL DEFAULT 0;
    """,
    # A device gives one update from each version, in rising order.
    """
    CREATE INDEX updates_device ON updates(device, version) WHERE rejected IS NULL;
    """,
]


@dataclass(frozen=True)
class StoredUpdate:
    """An acknowledged update: id (that of its assignment), device, version it started from, and record.

    `factor`: by which the device's change is merged, below 1 where it was clipped. `norm`: of that; None for
    an update from before norms were kept.
    """

    id: str
    device: str
    version: int
    update: Update
    factor: float = 1.0
    norm: float | None = None


@dataclass(frozen=True)
class Version:
    """A published global adapter. `digest` names its blob; energies are sums of σ² over all modules.

    `noise_multiplier` and `clip_norm` are those of differential privacy, 0 without it.
    """

    version: int
    digest: str
    rank: int  # live rank
    energy: float
    discarded_energy: float
    published_at: float
    noise_multiplier: float = 0.0
    clip_norm: float = 0.0

    @property
    def discarded_share(self) -> float:
        """What the rank cap dropped, as a share of the energy of the sum."""
        return self.discarded_energy / self.energy if self.energy else 0.0


_VERSION_COLUMNS = ", ".join(field.name for field in dataclasses.fields(Version))


@dataclass(frozen=True)
class Device:
    """An enrolled device."""

    id: str
    name: str
    rank: int
    updates: int
    mean_staleness: float
    refused: int


class Store:
    """One SQLite file. Methods are short, may be called from any thread, and commit before they return."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._migrate(path)
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path}: not a usable coordinator database ({error})") from error

    def _migrate(self, path: Path) -> None:
        """Bring an older schema up to date, one step a transaction; refuse a newer one."""
        (have,) = self._db.execute("PRAGMA user_version").fetchone()
        if have > len(MIGRATIONS):
            raise InputError(
                f"{path}: schema {have} is newer than this coordinator's {len(MIGRATIONS)}; update it"
            )
        for number, script in enumerate(MIGRATIONS[have:], have + 1):
            self._db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, on disk at the end."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk ends it by itself
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def close(self) -> None:
        """Fold the log into the file and let go of it."""
        with self._lock:
            self._db.close()

    # --- federation ---

    def meta(self, key: str) -> str | None:
        """A value of the federation's own, or None."""
        rows = self._rows("SELECT value FROM meta WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    def set_meta(self, key: str, value: str) -> None:
        """Set or replace such a value."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    # --- devices ---

    def add_device(
        self, id: str, name: str, credential_hash: str, profile: Mapping[str, str], now: float
    ) -> None:
        """Enrol a device. Only the hash of its credential is kept."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO devices(id, name, credential_hash, profile, joined_at) VALUES (?, ?, ?, ?, ?)",
                (id, name, credential_hash, json.dumps(dict(profile)), now),
            )

    def device_of(self, credential_hash: str) -> str | None:
        """The device that holds this credential, unless revoked."""
        rows = self._rows("SELECT id FROM devices WHERE credential_hash = ? AND revoked = 0", credential_hash)
        return str(rows[0][0]) if rows else None

    def devices(self) -> list[Device]:
        """All devices in order of joining, with what they contributed."""
        rows = self._rows(
            "SELECT d.id, d.name, d.rank, COUNT(u.merged_version), COALESCE(AVG(u.staleness), 0), d.refused "
            "FROM devices d LEFT JOIN updates u ON u.device = d.id GROUP BY d.id ORDER BY d.joined_at"
        )
        return [Device(*row) for row in rows]

    # --- assignments ---

    def add_assignment(self, device: str, assignment: Assignment, now: float) -> None:
        """Remember a lease; it replaces any that the device held."""
        with self._transaction() as db:
            db.execute("UPDATE assignments SET open = 0 WHERE device = ? AND open = 1", (device,))
            db.execute("UPDATE devices SET rank = ? WHERE id = ?", (assignment.rank, device))
            db.execute(
                "INSERT INTO assignments(id, device, version, rank, record, granted_at) VALUES (?,?,?,?,?,?)",
                (
                    assignment.id,
                    device,
                    assignment.version,
                    assignment.rank,
                    json.dumps(to_json(assignment)),
                    now,
                ),
            )

    def assignment(self, id: str, device: str) -> Assignment | None:
        """An assignment of this device, open or not."""
        rows = self._rows("SELECT record FROM assignments WHERE id = ? AND device = ?", id, device)
        return from_json(Assignment, json.loads(rows[0][0])) if rows else None

    def open_assignments(self) -> list[tuple[str, Assignment, float]]:
        """(device, assignment, when it was granted) of every lease that is neither delivered nor expired."""
        rows = self._rows("SELECT device, record, granted_at FROM assignments WHERE open = 1")
        return [(str(device), from_json(Assignment, json.loads(record)), at) for device, record, at in rows]

    def paces_s(self, newest: int) -> dict[str, tuple[float, ...]]:
        """Device -> seconds a step, from the grant to the update, of its newest assignments; oldest first.

        By clock times: where the clock was put back in between, nothing is known.
        """
        rows = self._rows(
            "SELECT device, pace_s FROM (SELECT u.device AS device, u.received_at AS at, "
            "(u.received_at - a.granted_at) / MAX(1, json_extract(u.record, '$.steps')) AS pace_s, "
            "ROW_NUMBER() OVER (PARTITION BY u.device ORDER BY u.received_at DESC) AS age "
            "FROM updates u JOIN assignments a ON a.id = u.assignment WHERE u.rejected IS NULL) "
            "WHERE age <= ? AND pace_s > 0 ORDER BY at",
            newest,
        )
        found: dict[str, tuple[float, ...]] = {}
        for device, pace_s in rows:
            found[device] = (*found.get(device, ()), pace_s)
        return found

    def refuse(self, device: str, assignment: str) -> None:
        """Count a refused adapter, and end its assignment: the device gets other work."""
        with self._transaction() as db:
            db.execute("UPDATE devices SET refused = refused + 1 WHERE id = ?", (device,))
            db.execute("UPDATE assignments SET open = 0 WHERE id = ?", (assignment,))

    def close_assignments(self, ids: Iterable[str]) -> None:
        """Leases that expired. Their updates may still come."""
        with self._transaction() as db:
            db.executemany("UPDATE assignments SET open = 0 WHERE id = ?", ((id,) for id in ids))

    # --- updates ---

    def add_update(self, stored: StoredUpdate, now: float) -> bool:
        """Acknowledge an update: once this returns it is on disk and will be in exactly one version.

        Returns:
            False if the very same update was there already.

        Raises:
            ProtocolError: another adapter was handed in for this assignment before.
            StaleUpdate: another update of this device, from this version or a newer one, came first.
        """
        with self._transaction() as db:
            known = db.execute("SELECT digest FROM updates WHERE assignment = ?", (stored.id,)).fetchone()
            if known:
                if known[0] != stored.update.digest:
                    raise ProtocolError(
                        f"assignment {stored.id} was delivered before, with digest {known[0][:12]}"
                    )
                return False
            newer = "SELECT version FROM updates WHERE device = ? AND version >= ? AND rejected IS NULL"
            if row := db.execute(newer, (stored.device, stored.version)).fetchone():
                raise StaleUpdate(
                    f"an update of this device from version {row[0]} is in; it counts once from each version"
                )
            db.execute(
                "INSERT INTO updates(assignment, device, version, record, digest, received_at, factor, norm) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    stored.id,
                    stored.device,
                    stored.version,
                    json.dumps(to_json(stored.update)),
                    stored.update.digest,
                    now,
                    stored.factor,
                    stored.norm,
                ),
            )
            db.execute("UPDATE assignments SET open = 0 WHERE id = ?", (stored.id,))
        return True

    def update_digest(self, assignment: str) -> str | None:
        """Digest of the update that was acknowledged for an assignment, if one was."""
        rows = self._rows("SELECT digest FROM updates WHERE assignment = ?", assignment)
        return str(rows[0][0]) if rows else None

    def rejection(self, assignment: str) -> str | None:
        """Why the update of an assignment is in no version and never will be; None if nothing says so."""
        rows = self._rows("SELECT rejected FROM updates WHERE assignment = ?", assignment)
        return rows[0][0] if rows else None

    def unmerged(self) -> list[StoredUpdate]:
        """Acknowledged updates that no version holds yet, oldest first."""
        rows = self._rows(
            "SELECT assignment, device, version, record, factor, norm FROM updates "
            "WHERE merged_version IS NULL AND rejected IS NULL ORDER BY received_at"
        )
        return [
            StoredUpdate(i, d, v, from_json(Update, json.loads(record)), factor, norm)
            for i, d, v, record, factor, norm in rows
        ]

    def recent_norms(self, count: int) -> list[tuple[str, float]]:
        """(device, norm as merged) of the newest `count` updates that were accepted, newest first."""
        return self._rows(
            "SELECT device, norm FROM updates WHERE norm IS NOT NULL AND rejected IS NULL "
            "ORDER BY received_at DESC LIMIT ?",
            count,
        )

    def clip(self, shorter: StoredUpdate) -> None:
        """Merge less of an update's change than was stored with it."""
        with self._transaction() as db:
            db.execute(
                "UPDATE updates SET factor = ?, norm = ? WHERE assignment = ? AND merged_version IS NULL",
                (shorter.factor, shorter.norm, shorter.id),
            )

    def clipped(self) -> int:
        """How many updates are or were merged by less than the whole."""
        ((count,),) = self._rows("SELECT COUNT(*) FROM updates WHERE factor < 1.0")
        return int(count)

    def last_contributions(self) -> dict[str, int]:
        """Device -> newest version that an update of it was trained from; rejected ones aside."""
        return dict(
            self._rows("SELECT device, MAX(version) FROM updates WHERE rejected IS NULL GROUP BY device")
        )

    def reject_updates(self, reasons: Mapping[str, str]) -> None:
        """Leave acknowledged updates out for good: id -> reason (a blob that rotted on disk, say)."""
        with self._transaction() as db:
            for id, reason in reasons.items():
                db.execute("UPDATE updates SET rejected = ? WHERE assignment = ?", (reason, id))

    # --- versions ---

    def publish(self, version: Version, merged: list[tuple[str, float, int]]) -> None:
        """Add a version and mark its updates (id, weight, staleness) as merged, in one transaction.

        What a version costs in privacy follows from its row and its updates', so that it is known as long as
        the version is. Under privacy no device may have two updates in it.
        """
        with self._transaction() as db:
            db.execute(
                f"INSERT INTO versions({_VERSION_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                dataclasses.astuple(version),
            )
            for id, weight, tau in merged:
                changed = db.execute(
                    "UPDATE updates SET merged_version = ?, weight = ?, staleness = ? "
                    "WHERE assignment = ? AND merged_version IS NULL AND rejected IS NULL",
                    (version.version, weight, tau, id),
                )
                if changed.rowcount != 1:
                    raise sqlite3.IntegrityError(
                        f"update {id} is merged already; version {version.version} dropped"
                    )
            twice = "SELECT device FROM updates WHERE merged_version = ? GROUP BY device HAVING COUNT(*) > 1"
            if version.noise_multiplier and (row := db.execute(twice, (version.version,)).fetchone()):
                raise sqlite3.IntegrityError(
                    f"device {row[0]} has two updates in private version {version.version}; it is dropped"
                )

    def versions(self, newest: int) -> list[Version]:
        """The newest versions, newest first. Version 0, which changes nothing, has no row."""
        rows = self._rows(f"SELECT {_VERSION_COLUMNS} FROM versions ORDER BY version DESC LIMIT ?", newest)
        return [Version(*row) for row in rows]

    def merged_updates(self, version: int) -> int:
        """How many updates a version was made of."""
        ((count,),) = self._rows("SELECT COUNT(*) FROM updates WHERE merged_version = ?", version)
        return int(count)

    def version(self, number: int) -> Version | None:
        """A published version."""
        rows = self._rows(f"SELECT {_VERSION_COLUMNS} FROM versions WHERE version = ?", number)
        return Version(*rows[0]) if rows else None

    def start(self, number: int) -> str:
        """What tells a version from another that once had its number; "" for 0, and for one not published."""
        stored = self.version(number)
        return stored.digest[:16] if stored else ""

    # --- privacy ---

    def entered(self) -> dict[str, dict[float, int]]:
        """Device -> noise multiplier -> versions published with that which hold an update of the device."""
        rows = self._rows(
            "SELECT u.device, v.noise_multiplier, COUNT(*) FROM updates u "
            "JOIN versions v ON v.version = u.merged_version GROUP BY u.device, v.noise_multiplier"
        )
        found: dict[str, dict[float, int]] = {}
        for device, noise_multiplier, count in rows:
            found.setdefault(device, {})[noise_multiplier] = count
        return found

    def versions_with_noise(self, noised: bool) -> int:
        """How many versions were published with differential privacy, or without."""
        ((count,),) = self._rows("SELECT COUNT(*) FROM versions WHERE (noise_multiplier > 0) = ?", noised)
        return int(count)
