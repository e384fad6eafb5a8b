"""The schema, as the steps that lead to it, and how an older database is brought up to date.

A step is one transaction, with the number that says that it was taken. Before the first, the whole database
is copied beside itself: a kill in between leaves the old one, the copy, or both, and the next start goes on.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from pathlib import Path

from coordinator.storage.failpoints import reach
from edge_sdk.core.errors import InputError
from edge_sdk.system.durable import Step, create, fsync_file, move_into_place
from edge_sdk.system.terminal import logger

log = logger("coordinator")

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
    # Whether the file of a version is gone, because nobody may need it any more. The row stays.
    """
    ALTER TABLE versions ADD COLUMN collected INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX versions_files ON versions(digest) WHERE collected = 0;
    """,
    # What the status shows of each device, so that it need not count all updates there ever were.
    """
    ALTER TABLE devices ADD COLUMN merged INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE devices ADD COLUMN staleness_sum INTEGER NOT NULL DEFAULT 0;
    UPDATE devices SET (merged, staleness_sum) = (
        SELECT COUNT(*), COALESCE(SUM(staleness), 0) FROM updates
        WHERE device = devices.id AND merged_version IS NOT NULL AND rejected IS NULL
    );
    CREATE INDEX updates_merged ON updates(merged_version) WHERE merged_version IS NOT NULL;
    CREATE INDEX updates_clipped ON updates(factor) WHERE factor < 1.0;
    """,
    # What the bound on norms is learnt from, and what it was at each version: each device counts by its
    # latest update, which is the one that came last, whatever the clock said.
    """
    ALTER TABLE devices ADD COLUMN latest_norm REAL;
    ALTER TABLE devices ADD COLUMN latest_arrival INTEGER;
    UPDATE devices SET (latest_norm, latest_arrival) = (
        SELECT norm, rowid FROM updates WHERE device = devices.id AND rejected IS NULL
        ORDER BY rowid DESC LIMIT 1
    );
    CREATE INDEX devices_heard ON devices(latest_arrival) WHERE latest_norm IS NOT NULL;
    ALTER TABLE versions ADD COLUMN norm_bound REAL;
    DROP INDEX updates_norms;
    """,
    # Work that was granted before it counts no more. Rows lie in the order in which they were written.
    """
    ALTER TABLE devices ADD COLUMN newest_assignment TEXT;
    UPDATE devices SET newest_assignment = newest.id
        FROM (SELECT device, id, MAX(rowid) FROM assignments GROUP BY device) AS newest
        WHERE newest.device = devices.id;
    """,
    # The version whose content one has because its host took back what came between.
    """
    ALTER TABLE versions ADD COLUMN reverts_to INTEGER;
    """,
    # Each time that a coordinator was started on this folder, and where that was. Which devices came with a
    # run that is not one of these, and in which of these that was.
    """
    CREATE TABLE runs (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL, began_at REAL NOT NULL, place TEXT NOT NULL
    ) STRICT;
    CREATE TABLE elsewhere (
        device TEXT PRIMARY KEY REFERENCES devices(id), run TEXT NOT NULL, heard_in INTEGER NOT NULL
    ) STRICT;
    """,
    # Who let a device in, how it stands, and when and from where it was heard of. A second credential
    # waits until it is used.
    """
    CREATE TABLE invitations (
        id TEXT PRIMARY KEY, token_hash TEXT NOT NULL UNIQUE, description TEXT NOT NULL,
        made_at REAL NOT NULL, expires_at REAL NOT NULL, uses INTEGER, used INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, what TEXT NOT NULL, device TEXT NOT NULL,
        address TEXT NOT NULL, detail TEXT NOT NULL, times INTEGER NOT NULL
    ) STRICT;
    ALTER TABLE devices ADD COLUMN standing TEXT NOT NULL DEFAULT 'member';
    UPDATE devices SET standing = 'revoked' WHERE revoked = 1;
    ALTER TABLE devices DROP COLUMN revoked;
    ALTER TABLE devices ADD COLUMN invitation TEXT;
    ALTER TABLE devices ADD COLUMN attempt_hash TEXT;
    ALTER TABLE devices ADD COLUMN next_credential_hash TEXT;
    ALTER TABLE devices ADD COLUMN credential_at REAL NOT NULL DEFAULT 0;
    UPDATE devices SET credential_at = joined_at;
    ALTER TABLE devices ADD COLUMN refused_why TEXT NOT NULL DEFAULT '';
    ALTER TABLE devices ADD COLUMN seen_at REAL;
    ALTER TABLE devices ADD COLUMN address TEXT NOT NULL DEFAULT '';
    CREATE UNIQUE INDEX devices_attempt ON devices(attempt_hash) WHERE attempt_hash IS NOT NULL;
    CREATE UNIQUE INDEX devices_next ON devices(next_credential_hash)
        WHERE next_credential_hash IS NOT NULL;
    """,
]


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring the database at `path` up to date; an older one is copied first, a new one made.

    Raises:
        InputError: its schema is newer than this.
    """
    have, newest = schema_of(db, path), len(MIGRATIONS)
    steps = list(enumerate(MIGRATIONS[have:], have + 1))
    if have == 0:  # a new one is made at once
        steps = [(newest, "".join(MIGRATIONS))]
    elif steps:
        copy = _copy(db, path, have)
        log.info("schema %d becomes %d; %s is as it was before", have, newest, copy)
    for number, script in steps:
        try:
            db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number};")
            reach("migration-written")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        reach("migration-committed")


def schema_of(db: sqlite3.Connection, path: Path) -> int:
    """How many steps a database has taken: 0 for a new one.

    Raises:
        InputError: more than there are; or its tables are not those of a coordinator.
    """
    (have,) = db.execute("PRAGMA user_version").fetchone()
    found = _columns(db)
    wanted = _columns_after(have) if 0 <= have <= len(MIGRATIONS) else _OF_EVERY_SCHEMA
    if have < 0 or not wanted <= found or (have == 0 and found):
        raise InputError(
            f"{path} has other tables than a coordinator's database; restore the folder from a backup"
        )
    if have > len(MIGRATIONS):
        raise InputError(
            f"{path}: schema {have} is newer than this coordinator's {len(MIGRATIONS)}; update it"
        )
    return int(have)


_OF_EVERY_SCHEMA = {("meta", "key"), ("meta", "value")}


@functools.cache
def _columns_after(steps: int) -> set[tuple[str, str]]:
    """What a database has that took so many steps."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript("".join(MIGRATIONS[:steps]))
        return _columns(db)


def _columns(db: sqlite3.Connection) -> set[tuple[str, str]]:
    """(table, column) of all tables but SQLite's own."""
    query = "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c "
    return set(db.execute(query + "WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite$_%' ESCAPE '$'"))


def _copy(db: sqlite3.Connection, path: Path, have: int) -> Path:
    """Copy the database beside itself, durably; a copy of the same schema from before is replaced."""
    copy = path.with_name(f"{path.name}.schema-{have}.bak")
    temporary = copy.with_name(f".{copy.name}-new")
    write_copy(db, temporary)
    move_into_place(temporary, copy, _copying)
    return copy


def _copying(step: Step) -> None:
    reach("migration-copied" if step == "written" else "migration-copy-renamed")


def write_copy(db: sqlite3.Connection, to: Path) -> None:
    """Copy a database as it is at one moment into one file, durably, whoever is writing to it meanwhile."""
    to.unlink(missing_ok=True)
    create(to).close()
    with contextlib.closing(sqlite3.connect(to)) as copy:
        db.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # whole in one file, without a log beside it
    fsync_file(to)
