"""What the coordinator must remember: every question to the database and every change of it, in SQL.

When a call that writes returns, the row is on disk. Blobs come first and rows second (see blobs.py), so a row
never names bytes that are not there. The tables are in `schema.py`, the connections in `database.py`.
"""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from coordinator.storage.database import Contradiction, Database
from coordinator.storage.members import Members
from coordinator.storage.rows import Run, StoredUpdate, Version, record_of
from edge_sdk.core.errors import BadUpdates, InternalError, ProtocolError, StaleUpdate
from edge_sdk.core.messages import Assignment, Update
from edge_sdk.core.records import encode

DATABASE = "coordinator.sqlite"  # in a data folder


_VERSION_COLUMNS = ", ".join(field.name for field in dataclasses.fields(Version))
_VERSION_MARKS = ", ".join("?" for _ in dataclasses.fields(Version))


def _version(*values: Any) -> Version:
    return replace(Version(*values), collected=bool(values[-1]))


# What nobody may need any more, in SQL: see needed_versions and needed_digests.
_NEEDED = """(version > (SELECT MAX(version) FROM versions) - ?
    OR version IN (SELECT version FROM assignments WHERE open = 1)
    OR version IN (SELECT version FROM updates WHERE merged_version IS NULL AND rejected IS NULL))"""
_DIGESTS_OF_VERSIONS = "SELECT digest FROM versions WHERE collected = 0"
_DIGESTS_OF_UPDATES = "SELECT digest FROM updates WHERE merged_version IS NULL AND rejected IS NULL"


class Store:
    """The rows of a federation. Methods are short, may be called from any thread, and commit at the end.

    `path` and `upgrade`: as for `Database`.

    Raises (every method):
        DiskFull, InternalError: the disk is full, read-only or fails; nothing of the transaction is there.
        Contradiction: a rule of the schema would be broken.
    """

    def __init__(self, path: Path, upgrade: bool = True) -> None:
        self.db = Database(path, upgrade)
        self.members = Members(self.db)

    def close(self) -> None:
        """Fold the log into the file and let go of it."""
        self.db.close()

    # --- federation ---

    def meta(self, key: str) -> str | None:
        """A value of the federation's own, or None."""
        rows = self.db.rows("SELECT value FROM meta WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    def set_meta(self, key: str, value: str) -> None:
        """Set or replace such a value."""
        with self.db.transaction("meta-written", "meta-committed") as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    # --- runs ---

    def begin_run(self, id: str, place: str, now: float) -> Run:
        """Count a start; the run that begins with it."""
        with self.db.transaction("run-written", "run-committed") as db:
            row = db.execute(
                "INSERT INTO runs SELECT COALESCE(MAX(number), 0) + 1, ?, ?, ? FROM runs RETURNING number",
                (id, now, place),
            ).fetchone()
        return Run(row[0], id, place)

    def newest_run(self) -> Run | None:
        """The run that began last; None in a folder that was last used before runs were counted."""
        rows = self.db.rows("SELECT number, id, place FROM runs ORDER BY number DESC LIMIT 1")
        return Run(*rows[0]) if rows else None

    def run_names(self) -> set[str]:
        """What devices call each run that there was."""
        return {name for (name,) in self.db.rows("SELECT number || '-' || id FROM runs")}

    def note_elsewhere(self, device: str, run: str) -> None:
        """Remember for the host that a device came with a run that is not one of these."""
        with self.db.transaction("elsewhere-written", "elsewhere-committed") as db:
            db.execute("INSERT OR REPLACE INTO elsewhere SELECT ?, ?, MAX(number) FROM runs", (device, run))

    def elsewhere(self) -> list[tuple[str, str]]:
        """(device, the run that it came with) of those that were noted since the last start."""
        newest = "SELECT MAX(number) FROM runs"
        return self.db.rows(f"SELECT device, run FROM elsewhere WHERE heard_in = ({newest}) ORDER BY device")

    def data_version(self) -> int:
        """A number that changes when another process has written here."""
        return self.db.data_version()

    # --- assignments ---

    def add_assignment(self, device: str, assignment: Assignment, now: float) -> None:
        """Remember a lease; it replaces any that the device held. Twice is the same as once."""
        with self.db.transaction("assignment-written", "assignment-committed") as db:
            if db.execute("SELECT 1 FROM assignments WHERE id = ?", (assignment.id,)).fetchone():
                return  # the device asked twice at once
            db.execute("UPDATE assignments SET open = 0 WHERE device = ? AND open = 1", (device,))
            db.execute(
                "UPDATE devices SET rank = ?, newest_assignment = ? WHERE id = ?",
                (assignment.rank, assignment.id, device),
            )
            db.execute(
                "INSERT INTO assignments(id, device, version, rank, record, granted_at) VALUES (?,?,?,?,?,?)",
                (
                    assignment.id,
                    device,
                    assignment.version,
                    assignment.rank,
                    encode(assignment).decode(),
                    now,
                ),
            )

    def assignment(self, id: str, device: str) -> Assignment | None:
        """An assignment of this device, open or not."""
        rows = self.db.rows("SELECT record FROM assignments WHERE id = ? AND device = ?", id, device)
        return record_of(Assignment, rows[0][0]) if rows else None

    def newest_assignments(self) -> dict[str, str]:
        """Device -> the assignment that was granted to it last, by the order of grants, not by a clock."""
        query = "SELECT id, newest_assignment FROM devices WHERE newest_assignment IS NOT NULL"
        return dict(self.db.rows(query))

    def open_assignments(self) -> list[tuple[str, Assignment, float]]:
        """(device, assignment, when it was granted) of every lease that is neither delivered nor expired."""
        rows = self.db.rows("SELECT device, record, granted_at FROM assignments WHERE open = 1")
        return [(str(device), record_of(Assignment, record), at) for device, record, at in rows]

    def paces_s(self, newest: int) -> dict[str, tuple[float, ...]]:
        """Device -> seconds a step, from the grant to the update, of its newest assignments; oldest first.

        By clock times: where the clock was put back in between, or a record is damaged, nothing is known.
        """
        rows = self.db.rows(
            "SELECT device, pace_s FROM (SELECT u.device AS device, u.received_at AS at, "
            "(u.received_at - a.granted_at) / MAX(1, CASE WHEN json_valid(u.record) "
            "THEN json_extract(u.record, '$.steps') END) AS pace_s, "
            "ROW_NUMBER() OVER (PARTITION BY u.device ORDER BY u.received_at DESC) AS age "
            "FROM updates u JOIN assignments a ON a.id = u.assignment WHERE u.rejected IS NULL) "
            "WHERE age <= ? AND pace_s > 0 ORDER BY at",
            newest,
        )
        found: dict[str, tuple[float, ...]] = {}
        for device, pace_s in rows:
            found[device] = (*found.get(device, ()), pace_s)
        return found

    def refuse(self, device: str, assignment: str, why: str) -> None:
        """Count a refused adapter, and end its assignment: the device gets other work."""
        with self.db.transaction("refusal-written", "refusal-committed") as db:
            change = "UPDATE devices SET refused = refused + 1, refused_why = ? WHERE id = ?"
            db.execute(change, (why, device))
            db.execute("UPDATE assignments SET open = 0 WHERE id = ?", (assignment,))

    def close_assignments(self, ids: Iterable[str]) -> None:
        """Leases that expired. Their updates may still come."""
        with self.db.transaction("expiry-written", "expiry-committed") as db:
            db.executemany("UPDATE assignments SET open = 0 WHERE id = ?", ((id,) for id in ids))

    # --- updates ---

    def add_update(self, stored: StoredUpdate, now: float) -> bool:
        """Acknowledge an update: once this returns it is on disk and will be in exactly one version.

        Returns:
            False if the very same update was there already.

        Raises:
            ProtocolError: another adapter was handed in for this assignment before.
            StaleUpdate: another update of this device, from this version or a newer one, came first; or the
                version that it was trained from was collected; or the device takes part no more.
        """
        with self.db.transaction("update-written", "update-committed") as db:
            known = db.execute("SELECT digest FROM updates WHERE assignment = ?", (stored.id,)).fetchone()
            if known:
                if known[0] != stored.update.digest:
                    raise ProtocolError(
                        f"assignment {stored.id} was delivered before, with digest {known[0][:12]}"
                    )
                return False
            _require_counts(db, stored)
            db.execute(
                "INSERT INTO updates(assignment, device, version, record, digest, received_at, factor, norm) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    stored.id,
                    stored.device,
                    stored.version,
                    encode(stored.update).decode(),
                    stored.update.digest,
                    now,
                    stored.factor,
                    stored.norm,
                ),
            )
            db.execute("UPDATE assignments SET open = 0 WHERE id = ?", (stored.id,))
            db.execute(
                "UPDATE devices SET latest_norm = ?, latest_arrival = (SELECT MAX(rowid) FROM updates) "
                "WHERE id = ?",
                (stored.norm, stored.device),
            )
        return True

    def update_digest(self, assignment: str) -> str | None:
        """Digest of the update that was acknowledged for an assignment, if one was."""
        rows = self.db.rows("SELECT digest FROM updates WHERE assignment = ?", assignment)
        return str(rows[0][0]) if rows else None

    def rejection(self, assignment: str) -> str | None:
        """Why the update of an assignment is in no version and never will be; None if nothing says so."""
        rows = self.db.rows("SELECT rejected FROM updates WHERE assignment = ?", assignment)
        return rows[0][0] if rows else None

    def update_bytes(self, assignment: str) -> int:
        """Size of the adapter that was acknowledged for an assignment; 0 if none was."""
        rows = self.db.rows("SELECT record FROM updates WHERE assignment = ?", assignment)
        return record_of(Update, rows[0][0]).size_bytes if rows else 0

    def unmerged(self) -> list[StoredUpdate]:
        """Acknowledged updates that no version holds yet, oldest first."""
        rows = self.db.rows(
            "SELECT assignment, device, version, record, factor, norm FROM updates "
            "WHERE merged_version IS NULL AND rejected IS NULL ORDER BY +rowid"
        )
        return [
            StoredUpdate(i, d, v, record_of(Update, record), factor, norm)
            for i, d, v, record, factor, norm in rows
        ]

    def unreadable_updates(self) -> dict[str, str]:
        """Of those, the ones whose record cannot be read: id -> what is wrong with it."""
        found = {}
        for id, record in self.db.rows(
            "SELECT assignment, record FROM updates WHERE merged_version IS NULL AND rejected IS NULL"
        ):
            try:
                record_of(Update, record)
            except InternalError as error:
                found[id] = str(error)
        return found

    def latest_norms(self, devices: int) -> list[float]:
        """The norm as merged of the newest accepted update of each device; of so many, those heard last.

        By the order in which updates came, not by the clock, which may be a year off.
        """
        rows = self.db.rows(
            "SELECT latest_norm FROM devices WHERE latest_norm IS NOT NULL "
            "ORDER BY latest_arrival DESC LIMIT ?",
            devices,
        )
        return [float(norm) for (norm,) in rows]

    def clip(self, shorter: StoredUpdate) -> None:
        """Merge less of an update's change than was stored with it."""
        with self.db.transaction("clip-written", "clip-committed") as db:
            db.execute(
                "UPDATE updates SET factor = ?, norm = ? WHERE assignment = ? AND merged_version IS NULL",
                (shorter.factor, shorter.norm, shorter.id),
            )
            db.execute(
                "UPDATE devices SET latest_norm = ? WHERE id = ? "
                "AND latest_arrival = (SELECT rowid FROM updates WHERE assignment = ?)",
                (shorter.norm, shorter.device, shorter.id),
            )

    def clipped(self) -> int:
        """How many updates are or were merged by less than the whole."""
        ((count,),) = self.db.rows("SELECT COUNT(*) FROM updates WHERE factor < 1.0")
        return int(count)

    def last_contributions(self) -> dict[str, int]:
        """Device -> newest version that an update of it was trained from; rejected ones aside."""
        return dict(
            self.db.rows("SELECT device, MAX(version) FROM updates WHERE rejected IS NULL GROUP BY device")
        )

    def reject_updates(self, reasons: Mapping[str, str]) -> None:
        """Leave acknowledged updates out for good: id -> reason (a blob that rotted on disk, say)."""
        with self.db.transaction("rejection-written", "rejection-committed") as db:
            for id, reason in reasons.items():
                db.execute(
                    "UPDATE updates SET rejected = ? WHERE assignment = ? AND merged_version IS NULL",
                    (reason, id),
                )
                db.execute(
                    "UPDATE devices SET latest_norm = NULL "
                    "WHERE latest_arrival = (SELECT rowid FROM updates WHERE assignment = ?)",
                    (id,),
                )

    # --- versions ---

    def publish(self, version: Version, merged: list[tuple[str, float, int]]) -> None:
        """Add a version and mark its updates (id, weight, staleness) as merged, in one transaction.

        What a version costs in privacy follows from its row and its updates', so that it is known as long as
        the version is. No device may have two updates in it.

        Raises:
            BadUpdates: some are left out by now, because their device takes part no more; names them.
        """
        with self.db.transaction("version-written", "version-committed") as db:
            db.execute(
                f"INSERT INTO versions({_VERSION_COLUMNS}) VALUES ({_VERSION_MARKS})",
                dataclasses.astuple(version),
            )
            out = "SELECT assignment, rejected FROM updates WHERE rejected IS NOT NULL AND assignment = ?"
            gone = [row for id, _, _ in merged for row in db.execute(out, (id,))]
            if gone:
                raise BadUpdates.of(dict(gone))
            for id, weight, tau in merged:
                changed = db.execute(
                    "UPDATE updates SET merged_version = ?, weight = ?, staleness = ? "
                    "WHERE assignment = ? AND merged_version IS NULL AND rejected IS NULL",
                    (version.version, weight, tau, id),
                )
                if changed.rowcount != 1:
                    raise Contradiction(f"update {id} is merged already; version {version.version} dropped")
                db.execute(
                    "UPDATE devices SET merged = merged + 1, staleness_sum = staleness_sum + ? "
                    "WHERE id = (SELECT device FROM updates WHERE assignment = ?)",
                    (tau, id),
                )
            twice = "SELECT device FROM updates WHERE merged_version = ? GROUP BY device HAVING COUNT(*) > 1"
            if row := db.execute(twice, (version.version,)).fetchone():
                raise Contradiction(
                    f"device {row[0]} has two updates in version {version.version}; it is dropped"
                )

    # --- taking versions back ---

    def want_revert(self, to: int | None) -> None:
        """The host wants a version with the content of version `to`; None: no longer."""
        with self.db.transaction("meta-written", "meta-committed") as db:
            if to is None:
                db.execute("DELETE FROM meta WHERE key = 'revert'")
            else:
                db.execute("INSERT OR REPLACE INTO meta VALUES ('revert', ?)", (str(to),))

    def wanted_revert(self) -> int | None:
        """The version that the host wants back; None while it wants none."""
        wanted = self.meta("revert")
        return None if wanted is None else int(wanted)

    def publish_revert(self, version: Version) -> None:
        """Add a version that has the content of an older one; all in one transaction.

        What was trained from those in between, and is in no version yet, is left out for good; and how long
        such changes were says nothing any more.
        """
        with self.db.transaction("version-written", "version-committed") as db:
            db.execute(
                f"INSERT INTO versions({_VERSION_COLUMNS}) VALUES ({_VERSION_MARKS})",
                dataclasses.astuple(version),
            )
            db.execute(
                "UPDATE devices SET latest_norm = NULL WHERE latest_arrival IN "
                "(SELECT rowid FROM updates WHERE version > ?)",
                (version.reverts_to,),
            )
            db.execute(
                "UPDATE updates SET rejected = ? "
                "WHERE version > ? AND merged_version IS NULL AND rejected IS NULL",
                (f"the host went back to version {version.reverts_to}", version.reverts_to),
            )
            db.execute("DELETE FROM meta WHERE key = 'revert'")

    def reverts(self) -> list[tuple[int, int]]:
        """(to, version) of every version that reverted to an older one."""
        return self.db.rows("SELECT reverts_to, version FROM versions WHERE reverts_to IS NOT NULL")

    def versions(self, newest: int) -> list[Version]:
        """The newest versions, newest first. Version 0, which changes nothing, has no row."""
        rows = self.db.rows(f"SELECT {_VERSION_COLUMNS} FROM versions ORDER BY version DESC LIMIT ?", newest)
        return [_version(*row) for row in rows]

    def newest(self) -> Version | None:
        """The newest version; None before there is any."""
        found = self.versions(1)
        return found[0] if found else None

    def merged_updates(self, version: int) -> int:
        """How many updates a version was made of."""
        ((count,),) = self.db.rows("SELECT COUNT(*) FROM updates WHERE merged_version = ?", version)
        return int(count)

    def version(self, number: int) -> Version | None:
        """A published version."""
        rows = self.db.rows(f"SELECT {_VERSION_COLUMNS} FROM versions WHERE version = ?", number)
        return _version(*rows[0]) if rows else None

    def start(self, number: int) -> str:
        """What tells a version from another that once had its number; "" for 0, and for one not published."""
        stored = self.version(number)
        return stored.digest[:16] if stored else ""

    # --- what files are needed ---

    def needed_versions(self, newest: int) -> list[Version]:
        """Versions of which somebody may still need the file, newest first.

        The `newest`; those that a device with an open assignment starts from, and those that an update which
        is in no version yet was trained from.
        """
        rows = self.db.rows(
            f"SELECT {_VERSION_COLUMNS} FROM versions WHERE {_NEEDED} ORDER BY version DESC", newest
        )
        return [_version(*row) for row in rows]

    def started_versions(self) -> set[int]:
        """The newest version, and those that devices with an open assignment start from; 0 may be one."""
        newest = "SELECT COALESCE(MAX(version), 0) FROM versions"
        return {v for (v,) in self.db.rows(f"SELECT version FROM assignments WHERE open = 1 UNION {newest}")}

    def collect_versions(self, newest: int) -> list[int]:
        """Say of all versions but `needed_versions` that their files are gone; of which that is new."""
        with self.db.transaction("collected-written", "collected-committed") as db:
            gone = f"collected = 0 AND NOT {_NEEDED}"
            query = f"UPDATE versions SET collected = 1 WHERE {gone} RETURNING version"
            rows = db.execute(query, (newest,)).fetchall()
        return sorted(version for (version,) in rows)

    def needed_digests(self) -> set[str]:
        """Of all blobs that a row needs: versions that are not collected, updates that are in none yet."""
        return {digest for (digest,) in self.db.rows(f"{_DIGESTS_OF_VERSIONS} UNION {_DIGESTS_OF_UPDATES}")}

    def is_needed(self, digest: str) -> bool:
        """Whether a blob is one of those."""
        query = f"{_DIGESTS_OF_VERSIONS} AND digest = ? UNION {_DIGESTS_OF_UPDATES} AND digest = ?"
        return bool(self.db.rows(query, digest, digest))

    def may_come(self, assignment: str, oldest: int) -> bool:
        """Whether its update is not here but may come.

        It is the last that its device was granted, and it is open, or from version `oldest` or later.
        """
        rows = self.db.rows(
            "SELECT 1 FROM assignments WHERE id = ? AND (open = 1 OR version >= ?) "
            "AND EXISTS (SELECT 1 FROM devices "
            "WHERE devices.id = assignments.device AND newest_assignment = assignments.id) "
            "AND NOT EXISTS (SELECT 1 FROM updates WHERE assignment = assignments.id)",
            assignment,
            oldest,
        )
        return bool(rows)

    # --- privacy ---

    def entered(self) -> dict[str, dict[float, int]]:
        """Device -> noise multiplier -> versions published with that which hold an update of the device."""
        rows = self.db.rows(
            "SELECT u.device, v.noise_multiplier, COUNT(*) FROM updates u "
            "JOIN versions v ON v.version = u.merged_version GROUP BY u.device, v.noise_multiplier"
        )
        found: dict[str, dict[float, int]] = {}
        for device, noise_multiplier, count in rows:
            found.setdefault(device, {})[noise_multiplier] = count
        return found

    def versions_with_noise(self, noised: bool) -> int:
        """How many versions were published with differential privacy, or without."""
        ((count,),) = self.db.rows("SELECT COUNT(*) FROM versions WHERE (noise_multiplier > 0) = ?", noised)
        return int(count)


def _require_counts(db: sqlite3.Connection, stored: StoredUpdate) -> None:
    """Raise StaleUpdate for an update that cannot be in any version any more."""
    standing = "SELECT standing FROM devices WHERE id = ? AND standing != 'member'"
    if row := db.execute(standing, (stored.device,)).fetchone():
        raise StaleUpdate(f"this device is {row[0]}; its update does not count")
    gone = "SELECT 1 FROM versions WHERE version = ? AND collected = 1"
    if db.execute(gone, (stored.version,)).fetchone():
        (current,) = db.execute("SELECT MAX(version) FROM versions").fetchone()
        raise StaleUpdate(
            f"version {stored.version} was collected; train from version {current}",
            current_version=current,
        )
    newer = "SELECT version FROM updates WHERE device = ? AND version >= ? AND rejected IS NULL"
    if row := db.execute(newer, (stored.device, stored.version)).fetchone():
        raise StaleUpdate(
            f"an update of this device from version {row[0]} is in; it counts once from each version"
        )
