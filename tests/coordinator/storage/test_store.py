"""The database: all or nothing, once and only once."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.storage.database import Contradiction
from coordinator.storage.rows import StoredUpdate, Version
from coordinator.storage.schema import MIGRATIONS
from coordinator.storage.store import Store
from edge_sdk.core.errors import BadUpdates, InputError, ProtocolError, StaleUpdate
from edge_sdk.core.messages import Assignment, Update
from edge_sdk.core.records import to_json

UPDATE = Update("ab" * 32, 100, 4, 160, 20, 2.5, 1.25, 30.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "coordinator.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    made = Store(path)
    for device in ("d", "e"):
        made.members.add_device(device, f"name of {device}", f"hash of {device}", {"system": "Linux"}, 1.0)
    yield made
    made.close()


def assignment(id: str, version: int = 0, rank: int = 4) -> Assignment:
    return Assignment(id, version, rank, carry_rank=0, steps=20, seed=1, expires_in_s=600.0)


def deliver(store: Store, id: str, device: str = "d", version: int = 0, at: float = 5.0) -> StoredUpdate:
    store.add_assignment(device, assignment(id, version), 2.0)
    stored = StoredUpdate(id, device, version, UPDATE)
    assert store.add_update(stored, at)
    return stored


def version(number: int) -> Version:
    return Version(number, "cd" * 32, 4, 2.0, 0.5, 9.0)


def test_what_was_written_is_there_after_reopening(path: Path, store: Store) -> None:
    stored = deliver(store, "a")
    store.set_meta("federation", "{}")
    store.close()
    again = Store(path)
    assert again.meta("federation") == "{}"
    assert again.unmerged() == [stored]
    assert again.members.credentials()["hash of d"] == "d"
    assert [device.name for device in again.members.devices()] == ["name of d", "name of e"]
    again.close()


def test_unknown_things_are_none(store: Store) -> None:
    assert store.meta("none") is None
    assert "hash of nobody" not in store.members.credentials()
    assert store.assignment("none", "d") is None
    assert store.update_digest("none") is None
    assert store.version(1) is None
    assert store.versions(5) == []


def test_an_assignment_belongs_to_its_device(store: Store) -> None:
    store.add_assignment("d", assignment("a"), 2.0)
    assert store.assignment("a", "d") == assignment("a")
    assert store.assignment("a", "e") is None


def test_a_device_has_one_open_assignment(store: Store) -> None:
    for id in ("a", "b"):
        store.add_assignment("d", assignment(id, rank=2), 2.0)
    store.add_assignment("e", assignment("c"), 2.0)
    assert store.open_assignments() == [("d", assignment("b", rank=2), 2.0), ("e", assignment("c"), 2.0)]
    store.close_assignments(["b"])
    assert store.open_assignments() == [("e", assignment("c"), 2.0)]
    assert store.assignment("b", "d") is not None  # its update may still come


def test_an_update_is_added_once(store: Store) -> None:
    stored = deliver(store, "a")
    assert not store.add_update(stored, 6.0)
    assert store.unmerged() == [stored]
    assert store.open_assignments() == []
    assert store.update_digest("a") == UPDATE.digest


def test_another_adapter_for_the_same_assignment_is_refused(store: Store) -> None:
    stored = deliver(store, "a")
    other = replace(stored, update=replace(UPDATE, digest="ef" * 32))
    with pytest.raises(ProtocolError, match="assignment a was delivered before, with digest abababababab"):
        store.add_update(other, 6.0)
    assert store.unmerged() == [stored]


def test_unmerged_updates_come_oldest_first(store: Store) -> None:
    for version, (id, at) in enumerate((("a", 7.0), ("b", 5.0), ("c", 6.0))):
        deliver(store, id, version=version, at=at)
    assert [stored.id for stored in store.unmerged()] == ["a", "b", "c"]  # whatever the clock said


def test_publish_marks_its_updates(store: Store) -> None:
    for number, (id, device) in enumerate((("a", "d"), ("b", "e"), ("c", "d"))):
        deliver(store, id, device, number)
    store.publish(version(1), [("a", 0.25, 0), ("b", 0.75, 2)])
    assert [stored.id for stored in store.unmerged()] == ["c"]
    assert store.versions(5) == [version(1)]
    assert [(d.id, d.updates, d.mean_staleness) for d in store.members.devices()] == [
        ("d", 1, 0.0),
        ("e", 1, 2.0),
    ]


def test_an_update_is_in_one_version_only_and_the_second_is_dropped_whole(store: Store) -> None:
    for id, device in (("a", "d"), ("b", "e")):
        deliver(store, id, device)
    store.publish(version(1), [("a", 1.0, 0)])
    with pytest.raises(Contradiction, match="update a is merged already"):
        store.publish(version(2), [("b", 0.5, 0), ("a", 0.5, 0)])
    assert store.versions(5) == [version(1)]
    assert [stored.id for stored in store.unmerged()] == ["b"]
    store.publish(version(2), [("b", 1.0, 0)])  # and the store goes on
    assert [v.version for v in store.versions(5)] == [2, 1]


def test_a_device_gives_one_update_from_each_version_in_rising_order(store: Store) -> None:
    deliver(store, "a", version=3)
    for id, number in (("b", 3), ("c", 2)):
        store.add_assignment("d", assignment(id, number), 2.0)
        with pytest.raises(StaleUpdate, match="an update of this device from version 3 is in"):
            store.add_update(StoredUpdate(id, "d", number, UPDATE), 6.0)
    deliver(store, "e", "e", version=3)
    store.reject_updates({"a": "its blob is gone"})
    deliver(store, "f", version=3)  # what is left out does not count


def test_paces_are_seconds_a_step_of_the_newest_assignments(store: Store) -> None:
    """Granted at 2.0 and of 20 steps, all of them; where the clock was put back, nothing is known."""
    for number, at in enumerate((22.0, 42.0, 1.0, 82.0)):
        deliver(store, f"d{number}", "d", number, at)
    deliver(store, "e0", "e", 0, 12.0)
    assert store.paces_s(8) == {"d": (1.0, 2.0, 4.0), "e": (0.5,)}
    assert store.paces_s(1) == {"d": (4.0,), "e": (0.5,)}
    store.reject_updates({"d3": "it was damaged"})
    assert store.paces_s(1) == {"d": (2.0,), "e": (0.5,)}


def test_a_version_is_published_once(store: Store) -> None:
    for id, device in (("a", "d"), ("b", "e")):
        deliver(store, id, device)
    store.publish(version(1), [("a", 1.0, 0)])
    with pytest.raises(Contradiction):
        store.publish(version(1), [("b", 1.0, 0)])
    assert [stored.id for stored in store.unmerged()] == ["b"]


def test_a_rejected_update_is_in_no_version_and_holds_its_device_up_no_longer(store: Store) -> None:
    deliver(store, "a", version=0)
    deliver(store, "b", version=3)
    assert store.last_contributions() == {"d": 3}
    store.reject_updates({"b": "its blob is gone"})
    assert [stored.id for stored in store.unmerged()] == ["a"]
    assert store.last_contributions() == {"d": 0}
    with pytest.raises(BadUpdates, match="update b: its blob is gone"):
        store.publish(version(1), [("b", 1.0, 0)])


def measured(store: Store, id: str, device: str, at: float, norm: float, factor: float = 1.0) -> None:
    """Deliver an update of this norm."""
    number = int(at)  # a newer one each time
    store.add_assignment(device, assignment(id, number), 2.0)
    assert store.add_update(StoredUpdate(id, device, number, UPDATE, factor, norm), at)


def test_each_device_counts_by_the_norm_of_its_latest_accepted_update(path: Path, store: Store) -> None:
    """Latest by the order in which they came: a clock may have been put back in between."""
    for id, device, at, norm in (("a", "d", 5.0, 1.0), ("b", "e", 7.0, 2.0), ("c", "d", 6.0, 3.0)):
        measured(store, id, device, at, norm)
    deliver(store, "from before norms were kept", version=8, at=8.0)
    measured(store, "x", "e", 9.0, 9.0)
    assert store.latest_norms(50) == [9.0]  # of the other device nothing is known of its last
    store.reject_updates({"x": "rotten"})
    assert store.latest_norms(50) == []
    measured(store, "y", "d", 10.0, 4.0)
    measured(store, "z", "e", 11.0, 2.0)
    store.publish(version(1), [("a", 1.0, 0)])  # merged or not
    store.close()
    again = Store(path)  # and they survive a restart
    assert again.latest_norms(50) == [2.0, 4.0]
    assert again.latest_norms(1) == [2.0]
    again.close()


def test_a_clipped_update_keeps_its_factor(path: Path, store: Store) -> None:
    measured(store, "a", "d", 5.0, 2.0, factor=0.25)
    measured(store, "b", "e", 6.0, 2.0)
    assert [(u.id, u.factor, u.norm) for u in store.unmerged()] == [("a", 0.25, 2.0), ("b", 1.0, 2.0)]
    assert store.clipped() == 1
    (_, whole) = store.unmerged()
    store.clip(replace(whole, factor=0.5, norm=1.0))
    assert [(u.id, u.factor, u.norm) for u in store.unmerged()] == [("a", 0.25, 2.0), ("b", 0.5, 1.0)]
    assert store.clipped() == 2


def test_a_refusal_is_counted_and_ends_the_assignment(store: Store) -> None:
    for id in ("a", "b"):
        store.add_assignment("d", assignment(id), 2.0)
        store.refuse("d", id, "shapes")
    assert store.open_assignments() == []
    assert [(d.id, d.refused) for d in store.members.devices()] == [("d", 2), ("e", 0)]


def test_a_database_of_the_first_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.sqlite"
    database = sqlite3.connect(path)
    database.executescript(MIGRATIONS[0] + "PRAGMA user_version = 1;")
    database.execute("INSERT INTO devices VALUES ('d', 'attic', 'hash', '{}', 4, 1.0, 0)")
    record = json.dumps(to_json(UPDATE))
    database.execute("INSERT INTO assignments VALUES ('a', 'd', 0, 4, '{}', 2.0, 0)")
    database.execute(
        "INSERT INTO updates VALUES ('a', 'd', 0, ?, ?, 5.0, NULL, NULL, NULL, NULL)", (record, UPDATE.digest)
    )
    for id, staleness in (("b", 1), ("c", 4)):
        database.execute(f"INSERT INTO assignments VALUES ('{id}', 'd', 0, 4, '{{}}', 2.0, 0)")
        database.execute(
            f"INSERT INTO updates VALUES ('{id}', 'd', 0, ?, 'x', 5.0, 1, 1.0, {staleness}, NULL)", (record,)
        )
    database.commit()
    database.close()
    store = Store(path)
    assert [(d.updates, d.mean_staleness) for d in store.members.devices()] == [(2, 2.5)]
    assert store.unmerged() == [StoredUpdate("a", "d", 0, UPDATE)]
    assert store.latest_norms(50) == []
    assert [d.refused for d in store.members.devices()] == [0]
    store.close()


def test_a_failure_in_a_transaction_leaves_nothing(store: Store) -> None:
    with pytest.raises(Contradiction):
        store.add_assignment("nobody", assignment("a"), 2.0)
    assert store.assignment("a", "nobody") is None
    store.add_assignment("d", assignment("a"), 2.0)


def test_commits_are_durable(store: Store) -> None:
    assert store.db.rows("PRAGMA journal_mode") == [("wal",)]
    with store.db.transaction("meta-written", "meta-committed") as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_a_newer_schema_is_refused(path: Path, store: Store) -> None:
    store.close()
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    database.close()
    with pytest.raises(InputError, match=f"schema {len(MIGRATIONS) + 1} is newer than this coordinator's"):
        Store(path)


@pytest.mark.parametrize("content", [b"this is no database, whatever its name says" * 50, b"\0" * 5000])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "coordinator.sqlite"
    path.write_bytes(content)
    with pytest.raises(InputError, match="coordinator.sqlite: not a usable coordinator database"):
        Store(path)
    assert path.read_bytes() == content


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a usable coordinator database"):
        Store(tmp_path)


def test_what_a_device_entered_is_counted_from_the_versions(store: Store) -> None:
    """By noise multiplier; a version without noise counts as 0."""
    for number, (z, devices) in enumerate(((2.0, "de"), (2.0, "d"), (1.5, "d"), (0.0, "e")), 1):
        ids = [(deliver(store, f"{device}{number}", device, number - 1).id, 0.5, 0) for device in devices]
        store.publish(replace(version(number), noise_multiplier=z, clip_norm=1.0), ids)
    assert store.entered() == {"d": {2.0: 2, 1.5: 1}, "e": {2.0: 1, 0.0: 1}}
    assert (store.versions_with_noise(True), store.versions_with_noise(False)) == (3, 1)
    assert store.versions(2)[1].noise_multiplier == 1.5


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
def test_a_version_takes_one_update_of_a_device(store: Store, noise_multiplier: float) -> None:
    merged = [(deliver(store, id, "d", number).id, 0.5, 0) for number, id in enumerate("ab")]
    with pytest.raises(Contradiction, match="device d has two updates in version 1"):
        store.publish(replace(version(1), noise_multiplier=noise_multiplier), merged)
    assert store.version(1) is None
    assert len(store.unmerged()) == 2
    store.publish(version(1), merged[:1])


def test_the_newest_assignment_of_a_device_is_the_one_granted_last_whatever_the_clock_says(
    store: Store,
) -> None:
    for id, granted_at in (("b", 100.0), ("a", 50.0), ("c", 1.0)):
        store.add_assignment("d", assignment(id), granted_at)
    assert store.newest_assignments() == {"d": "c"}
    assert store.may_come("c", 0)
    assert not store.may_come("a", 0)  # it counts no more, and what was uploaded of it may go
