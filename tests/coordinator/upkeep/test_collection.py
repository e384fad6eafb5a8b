"""What may still be needed is never collected, whatever happens in whatever order; what is not, is."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordinator.adapters.examination import Examination
from coordinator.adapters.serving import Serving
from coordinator.adapters.uploads import Uploads
from coordinator.settings import Settings, load_settings
from coordinator.storage import failpoints
from coordinator.storage.blobs import Blobs
from coordinator.storage.pins import Pins
from coordinator.storage.rows import StoredUpdate, Version
from coordinator.storage.store import Store
from coordinator.upkeep.collection import Collector
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import InternalError, NotFound, StaleUpdate
from edge_sdk.core.messages import Assignment, Update
from tests.coordinator.devices import SCALING, configuration, random_adapter, update_of

KEEP, STALENESS = 3, 1


def an_assignment(id: str, version: int) -> Assignment:
    return Assignment(id, version, 4, carry_rank=0, steps=20, seed=1, expires_in_s=600.0)


def an_update(content: bytes) -> Update:
    digest = hashlib.sha256(content).hexdigest()
    return Update(digest, len(content), 4, 10, 20, 2.5, 1.5, 3.0)


@dataclass
class Host:
    """A data folder, and a naive account of what it must hold."""

    folder: Path
    current: int = 0
    digests: dict[int, str] = field(default_factory=dict)  # version -> of its blob
    leases: dict[str, int] = field(default_factory=dict)  # open assignment -> version
    late: dict[str, int] = field(default_factory=dict)  # expired assignment -> version
    buffer: dict[str, tuple[int, str]] = field(default_factory=dict)  # update -> version, digest
    parts: set[str] = field(default_factory=set)
    count: int = 0

    def __post_init__(self) -> None:
        self.store, self.blobs = Store(self.folder / "coordinator.sqlite"), Blobs(self.folder)
        self.collector = Collector(self.store, self.blobs, KEEP, STALENESS)

    def grant(self) -> str:
        self.count += 1
        id = f"a{self.count}"
        self.store.members.add_device(f"d-{id}", id, id, {}, 1.0)
        self.store.add_assignment(f"d-{id}", an_assignment(id, self.current), 2.0)
        self.leases[id] = self.current
        return id

    def upload(self, id: str, content: bytes) -> None:
        self.blobs.append(id, self.blobs.offset(id), content[self.blobs.offset(id) :], 1000)
        self.parts.add(id)

    def deliver(self, id: str, content: bytes) -> None:
        version = (self.leases | self.late)[id]
        self.upload(id, content)
        update = an_update(content)
        with self.blobs.pins.hold(update.digest):
            self.blobs.finish(id, update.digest)
            self.store.add_update(StoredUpdate(id, f"d-{id}", version, update), float(self.count))
        self.parts.discard(id)
        self.leases.pop(id, None)
        self.late.pop(id, None)
        self.buffer[id] = version, update.digest

    def publish(self, content: bytes) -> None:
        with self.blobs.keeping() as write:
            digest = write([content])
            version = Version(self.current + 1, digest, 4, 2.0, 0.5, 9.0)
            self.store.publish(version, [(id, 1.0, 0) for id in self.buffer])
        self.current += 1
        self.digests[self.current] = digest
        self.buffer.clear()

    def needed_versions(self) -> set[int]:
        newest = {v for v in self.digests if v > self.current - KEEP or v >= self.current - STALENESS}
        started = {*self.leases.values(), *(version for version, _ in self.buffer.values())}
        return newest | (started & set(self.digests))

    def needed(self) -> set[str]:
        return {self.digests[v] for v in self.needed_versions()} | {d for _, d in self.buffer.values()}

    def check(self) -> None:
        there = set(self.blobs.digests())
        assert self.needed() <= there
        for version in self.needed_versions():
            stored = self.store.version(version)
            assert stored
            assert not stored.collected
        countable = {v for v, at in (self.leases | self.late).items() if at >= self.current - STALENESS}
        assert self.parts & (countable | set(self.leases)) <= set(self.blobs.upload_ids())


class Collecting(RuleBasedStateMachine):
    """Everything that makes and uses files, in any order, with collection at any time, also broken off."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.host = Host(self.folder)

    def teardown(self) -> None:
        failpoints.arm("")
        self.host.store.close()
        shutil.rmtree(self.folder)

    @rule()
    def grant(self) -> None:
        self.host.grant()

    @precondition(lambda self: self.host.leases)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.host.leases)))
        self.host.store.close_assignments([id])
        self.host.late[id] = self.host.leases.pop(id)

    @precondition(lambda self: self.host.leases)
    @rule(data=st.data())
    def send_half(self, data: st.DataObject) -> None:
        self.host.upload(data.draw(st.sampled_from(sorted(self.host.leases))), b"half")

    @precondition(lambda self: self.host.leases | self.host.late)
    @rule(data=st.data(), content=st.sampled_from([b"half a", b"half b"]))
    def deliver(self, data: st.DataObject, content: bytes) -> None:
        """Few contents: blobs are shared, by versions too."""
        host = self.host
        id = data.draw(st.sampled_from(sorted(host.leases | host.late)))
        version = (host.leases | host.late)[id]
        if version < host.current - STALENESS:  # refused before anything is written
            return
        host.deliver(id, content)

    @precondition(lambda self: self.host.buffer)
    @rule(data=st.data())
    def reject(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.host.buffer)))
        self.host.store.reject_updates({id: "its file is not what was acknowledged"})
        del self.host.buffer[id]

    @rule(content=st.sampled_from([b"half a", b"half b", b"c", b"d", b"e"]))
    def publish(self, content: bytes) -> None:
        self.host.publish(content)

    @rule()
    def collect(self) -> None:
        host = self.host
        host.collector.run()
        host.check()
        assert set(host.blobs.digests()) == host.needed()
        for id in host.blobs.upload_ids():
            version = (host.leases | host.late)[id]
            assert id in host.leases or version >= host.current - STALENESS
        host.parts = set(host.blobs.upload_ids())

    @rule(
        point=st.sampled_from(["collected-written", "collected-committed", "blob-collected"]),
        time=st.integers(1, 3),
    )
    def collect_and_break_off(self, point: str, time: int) -> None:
        failpoints.arm(f"{point}@{time}=EIO")
        try:
            self.host.collector.run()
        except InternalError:
            pass
        finally:
            failpoints.arm("")
        self.host.parts &= set(self.host.blobs.upload_ids())

    @rule()
    def restart(self) -> None:
        self.host.store.close()
        self.host.store = Store(self.folder / "coordinator.sqlite")
        self.host.blobs = Blobs(self.folder)
        self.host.collector = Collector(self.host.store, self.host.blobs, KEEP, STALENESS)
        self.host.collector.tidy()

    @invariant()
    def all_that_is_needed_is_there(self) -> None:
        self.host.check()


TestCollecting = Collecting.TestCase
TestCollecting.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


# --- pins ---------------------------------------------------------------------------------------


def test_what_is_held_is_not_removed() -> None:
    pins, removed = Pins(), []
    with pins.hold("a"), pins.hold("a", "b"):
        assert not pins.remove("a", lambda: False, lambda: removed.append("a"))
    assert not pins.remove("a", lambda: True, lambda: removed.append("needed"))
    assert pins.remove("a", lambda: False, lambda: removed.append("a"))
    assert removed == ["a"]


def test_who_comes_during_a_removal_waits_for_its_end() -> None:
    pins, order = Pins(), []
    began, go_on = threading.Event(), threading.Event()

    def remove() -> None:
        began.set()
        assert go_on.wait(30.0)
        order.append("removed")

    def hold() -> None:
        with pins.hold("a"):
            order.append("held")

    remover = threading.Thread(target=pins.remove, args=("a", lambda: False, remove))
    remover.start()
    assert began.wait(30.0)
    with pins.hold("another"):  # which nobody is removing
        order.append("another")
    holder = threading.Thread(target=hold)
    holder.start()
    go_on.set()
    for thread in (remover, holder):
        thread.join(30.0)
    assert order == ["another", "removed", "held"]


def test_a_removal_that_fails_ends_too() -> None:
    pins = Pins()

    def fail() -> None:
        raise OSError("the disk is read-only")

    with pytest.raises(OSError, match="read-only"):
        pins.remove("a", lambda: False, fail)
    with pins.hold("a"):
        pass


# --- an upload whose blob is being removed ------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path / "data")
    yield made
    made.store.close()


@pytest.fixture
def chosen(tmp_path: Path) -> Settings:
    config = tmp_path / "c.toml"
    config.write_text(configuration(tmp_path, rule="innovation"))
    return load_settings(config)


@pytest.fixture(autouse=True)
def data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()


CONTENT = codec.encode(random_adapter(4, 1), SCALING)
DIGEST = update_of(CONTENT, 4).digest


def an_orphan(host: Host) -> None:
    """A blob whose update is in a version: nobody needs it."""
    id = host.grant()
    host.blobs.append(id, 0, CONTENT, 1 << 20)
    host.blobs.finish(id, DIGEST)
    host.store.add_update(StoredUpdate(id, f"d-{id}", 0, update_of(CONTENT, 4)), 1.0)
    first = host.blobs.write([codec.encode(random_adapter(4, 9), SCALING)])
    host.store.publish(Version(1, first, 4, 2.0, 0.5, 9.0), [(id, 1.0, 0)])
    host.current = 1
    assert not host.store.is_needed(DIGEST)


def keeping(host: Host, chosen: Settings) -> tuple[Uploads, StoredUpdate]:
    """A device that has sent the very same bytes, checked and about to be acknowledged."""
    id = host.grant()
    host.blobs.append(id, 0, CONTENT, 1 << 20)
    federation = chosen.build("f")
    examination = Examination(federation, host.store, host.blobs, None, None)
    uploads = Uploads(federation, host.store, host.blobs, examination)
    return uploads, StoredUpdate(id, f"d-{id}", 1, update_of(CONTENT, 4))


def test_a_blob_is_safe_between_its_file_and_its_row(
    host: Host, chosen: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_orphan(host)
    uploads, stored = keeping(host, chosen)
    add_update = host.store.add_update

    def collected_meanwhile(update: StoredUpdate, now: float) -> bool:
        assert host.blobs.offset(update.id) == 0  # what was sent is gone, for the blob was there
        assert host.collector.run().files == 0
        return add_update(update, now)

    monkeypatch.setattr(host.store, "add_update", collected_meanwhile)
    assert uploads.keep(stored)
    assert host.blobs.is_intact(DIGEST)
    host.collector.run()
    assert host.blobs.is_intact(DIGEST)


def test_a_version_is_safe_between_its_file_and_its_row(host: Host) -> None:
    with host.blobs.keeping() as write:
        digest = write([b"a version"])
        assert host.collector.run().files == 0
    assert host.blobs.is_intact(digest)
    assert host.collector.run().files == 1  # it was never published


def test_an_upload_that_meets_the_removal_of_its_blob_becomes_one_itself(
    host: Host, chosen: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_orphan(host)
    uploads, stored = keeping(host, chosen)
    began, go_on = threading.Event(), threading.Event()
    remove = host.collector._remove

    def slowly(path: Path, *more: object) -> None:
        if path.name == DIGEST:
            began.set()
            assert go_on.wait(30.0)
        remove(path, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(host.collector, "_remove", slowly)
    collection = threading.Thread(target=host.collector.run)
    collection.start()
    assert began.wait(30.0)  # it was asked whether anybody needs the blob: nobody did
    kept: list[bool] = []
    keeper = threading.Thread(target=lambda: kept.append(uploads.keep(stored)))
    keeper.start()
    keeper.join(0.2)
    assert kept == []  # it waits
    go_on.set()
    for thread in (collection, keeper):
        thread.join(30.0)
    assert kept == [True]
    assert host.blobs.is_intact(DIGEST)
    assert host.store.is_needed(DIGEST)


def test_uploads_and_collection_side_by_side(host: Host, chosen: Settings) -> None:
    """Real threads: whenever an update is acknowledged its file is there."""
    an_orphan(host)
    stop, failed = threading.Event(), []

    def collect() -> None:
        while not stop.is_set():
            host.collector.run()

    def hand_in() -> None:
        for _ in range(40):
            with lock:
                uploads, stored = keeping(host, chosen)
            uploads.check_adapter(stored.device, an_assignment(stored.id, 1), stored.update)
            uploads.keep(stored)
            if not host.blobs.is_intact(DIGEST):
                failed.append(stored.id)
            host.store.reject_updates({stored.id: "so that nobody needs it any more"})

    lock = threading.Lock()
    collector, sender = threading.Thread(target=collect), threading.Thread(target=hand_in)
    collector.start()
    sender.start()
    sender.join(60.0)
    stop.set()
    collector.join(60.0)
    assert failed == []
    assert not sender.is_alive()
    assert not collector.is_alive()


# --- what is told of what is gone ---------------------------------------------------------------


def test_a_collected_version_is_told_by_name(host: Host, chosen: Settings) -> None:
    for number in range(6):
        host.publish(f"version {number}".encode())
    lease = host.grant()
    host.leases.clear()
    host.store.close_assignments([lease])
    found = host.collector.run()
    assert (found.versions, found.files) == ((1, 2, 3), 3)
    assert str(found) == "3 files, 0.0 MB"
    serving = Serving(chosen.build("f"), host.store, host.blobs, host.collector.newest)
    with pytest.raises(NotFound, match="version 3 was collected; the 3 newest are kept"):
        serving.require(3, 4, 6)
    serving.require(4, 4, 6)
    late = host.grant()
    with pytest.raises(StaleUpdate, match="version 2 was collected; train from version 6") as refusal:
        host.store.add_update(StoredUpdate(late, f"d-{late}", 2, an_update(b"late")), 1.0)
    assert refusal.value.details == {"current_version": 6}


def test_files_to_start_from_go_with_the_devices_that_start_from_them(host: Host, chosen: Settings) -> None:
    federation = chosen.build("f")
    leased = host.grant()  # from version 0
    host.publish(b"one")
    host.publish(b"two")
    names = [f"{federation.id}-{v}-{end}.safetensors" for v in (0, 1, 2) for end in ("4", "4-int8")]
    for name in names:
        with host.blobs.caching(name) as file:
            file.write(b"factors")
    with host.blobs.pins.hold(names[2]):
        host.collector.run()
        assert sorted(host.blobs.cached_names()) == sorted([*names[:3], *names[4:]])
    host.store.close_assignments([leased])
    host.collector.run()
    assert sorted(host.blobs.cached_names()) == sorted(names[4:])
    host.collector.tidy()  # a start: after a power cut nobody knows which are whole
    assert host.blobs.cached_names() == []


def test_a_start_removes_what_was_being_written(host: Host) -> None:
    digest = host.blobs.write([b"whole"])
    strays = [host.folder / "uploads" / ".write-7-0a", host.folder / "cache" / ".f-1-4.safetensors-0a"]
    for stray in strays:
        stray.write_bytes(b"half")
    assert host.collector.tidy().files == 2
    assert not any(stray.exists() for stray in strays)
    assert host.blobs.is_intact(digest)


def test_a_run_is_bounded_and_the_next_goes_on(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.upkeep.collection.MOST_FILES", 3)
    for number in range(7):
        host.blobs.write([str(number).encode()])
    assert [host.collector.run().files for _ in range(4)] == [3, 3, 1, 0]
    for number in range(12):  # of every other one the update may still come
        host.blobs.append(host.grant() if number % 2 else f"unknown{number}", 0, b"half", 100)
    assert [host.collector.run().files for _ in range(3)] == [3, 3, 0]
    assert set(host.blobs.upload_ids()) == set(host.leases)


def test_other_files_in_the_folder_are_left_alone(host: Host) -> None:
    (host.folder / "blobs" / "3f").mkdir()
    others = [host.folder / "blobs" / "notes.txt", host.folder / "blobs" / "3f" / "notes.txt"]
    for other in others:
        other.write_text("the host's own")
    host.collector.run()
    assert all(other.exists() for other in others)
