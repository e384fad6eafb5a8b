"""Fifty acknowledged updates of which some are no longer what they were: each is named, the others count."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from coordinator.engine.events import Buffered, Merge
from coordinator.merging.aggregation import aggregate
from coordinator.merging.merger import Merger
from coordinator.merging.sources import Addend, StartVersion
from coordinator.settings import load_settings
from coordinator.storage.blobs import Blobs
from coordinator.storage.rows import StoredUpdate, Version
from coordinator.storage.store import Store
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import AdapterError, BadUpdates, InternalError, OurFault
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Assignment, Federation
from tests.coordinator.devices import SCALING, SHAPES, configuration, random_adapter, update_of
from tests.edge_sdk.core.draws import dense

COUNT, RANK = 50, 2
Q, UP = "model.layers.0.q_proj", "model.layers.0.up_proj"


@dataclass
class Host:
    """A data folder with fifty updates that were acknowledged."""

    federation: Federation
    store: Store
    blobs: Blobs
    ids: list[str]

    def file(self, number: int) -> Path:
        """Where an update lies."""
        (digest,) = [u.update.digest for u in self.store.unmerged() if u.id == self.ids[number]]
        return self.blobs.path(digest)

    def merge(self, without: set[str] | None = None, version: int = 1) -> Version:
        """What the engine asks for, with equal weights."""
        left = [id for id in self.ids if id not in (without or set())]
        weights = tuple((Buffered(id, f"d{id}", 0, 10), 1 / len(left), 0) for id in left)
        return Merger(self.federation, self.store, self.blobs).merge(Merge(version, weights))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    config = tmp_path / "config.toml"
    config.write_text(configuration(tmp_path))
    federation = load_settings(config).build("f")
    made = Host(federation, Store(tmp_path / "coordinator.sqlite"), Blobs(tmp_path), [])
    for number in range(COUNT):
        id = f"u{number:02d}"
        content = codec.encode(random_adapter(RANK, number), SCALING)
        made.blobs.write([content])
        made.store.members.add_device(f"d{id}", id, id, {}, 1.0)
        made.store.add_assignment(f"d{id}", Assignment(id, 0, RANK, 0, 20, 1, 600.0), 2.0)
        made.store.add_update(StoredUpdate(id, f"d{id}", 0, update_of(content, RANK)), float(number))
        made.ids.append(id)
    return made


def check_the_others_count(host: Host, without: set[str]) -> None:
    """They are merged, and what comes out is their average."""
    version = host.merge(without)
    stored = dict(codec.open_own(host.blobs.path(version.digest), SCALING).modules())
    kept = [random_adapter(RANK, n) for n, id in enumerate(host.ids) if id not in without]
    for name, shape in SHAPES.items():
        expected = dense([(1 / len(kept), adapter[name]) for adapter in kept])
        u, s, vt = np.linalg.svd(expected, full_matrices=False)
        rank = min(host.federation.rank_cap, *shape)
        np.testing.assert_allclose(
            stored[name].product(), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-5 * s[0]
        )
    assert [u.id for u in host.store.unmerged()] == sorted(without)


def spoilt(kind: str, content: bytes) -> bytes | None:
    """An update's file as it may be found; None where it is gone."""
    adapter = random_adapter(RANK, 7)
    if kind == "not finite":
        b = adapter[UP].b.copy()
        b[3, 1] = np.nan
        return codec.encode(adapter | {UP: LoraFactors(b, adapter[UP].a)}, SCALING)
    if kind == "a flipped bit":  # in the mantissa of a value of the last tensor
        return content[:-3] + bytes([content[-3] ^ 0x10]) + content[-2:]
    if kind == "cut short":
        return content[:-4]
    if kind == "a wrong module":
        return codec.encode({n.replace("q_proj", "o_proj"): f for n, f in adapter.items()}, SCALING)
    if kind == "another base":
        doubled = {n: LoraFactors(np.tile(f.b, (2, 1)), np.tile(f.a, (1, 2))) for n, f in adapter.items()}
        return codec.encode(doubled, SCALING)
    if kind == "rank 0":
        return codec.encode(adapter | {Q: LoraFactors.empty(*SHAPES[Q])}, SCALING)
    assert kind == "gone"
    return None


REASONS = {
    "not finite": f"module {UP} holds values that are not finite",
    "a flipped bit": "not what was acknowledged",
    "cut short": "not a safetensors file|does not lie within the file",
    "a wrong module": f"module {Q} is missing",
    "another base": r"has shape .*, expected",
    "rank 0": rf"{Q}.*has shape \[.*0.*\], expected",
    "gone": "No such file",
}


def spoil(host: Host, number: int, kind: str) -> None:
    path = host.file(number)
    content = spoilt(kind, path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)


@pytest.mark.parametrize("kind", REASONS)
def test_one_of_fifty_is_named_and_the_other_forty_nine_count(host: Host, kind: str) -> None:
    spoil(host, 7, kind)
    with pytest.raises(BadUpdates, match=f"update u07: .*({REASONS[kind]})") as refusal:
        host.merge()
    assert isinstance(refusal.value, OurFault)
    assert set(refusal.value.reasons) == {"u07"}
    assert host.store.versions(1) == []  # nothing was published
    check_the_others_count(host, {"u07"})


def test_all_bad_ones_are_found_in_one_pass(host: Host) -> None:
    for number, kind in enumerate(REASONS):
        spoil(host, 5 * number, kind)
    with pytest.raises(BadUpdates) as refusal:
        host.merge()
    assert set(refusal.value.reasons) == {f"u{5 * number:02d}" for number in range(len(REASONS))}
    check_the_others_count(host, set(refusal.value.reasons))


def test_fifty_good_ones_are_merged(host: Host) -> None:
    check_the_others_count(host, set())


def test_a_damaged_global_adapter_is_our_fault_and_no_update_is_blamed(host: Host) -> None:
    first, rest = host.ids[:25], set(host.ids[25:])
    path = host.blobs.path(host.merge(rest).digest)
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 0x10]) + content[-2:])
    with pytest.raises(InternalError, match="version 1 .*not what was published"):
        host.merge(set(first), version=2)
    path.write_bytes(content)
    assert host.merge(set(first), version=2).version == 2


# --- without a store: what `aggregate` itself refuses ---------------------------------------------


def addend(host: Host, number: int, content: bytes) -> Addend:
    return Addend(f"x{number}", 0.5, host.blobs.path(host.blobs.write([content])), RANK)


def test_an_empty_buffer_is_refused(host: Host) -> None:
    with pytest.raises(AdapterError, match="the buffer is empty"):
        aggregate(host.federation, 1.0, StartVersion(0), [], host.blobs.write)


def test_files_that_were_bad_from_the_start_are_all_named_with_their_module(host: Host) -> None:
    kinds = ["not finite", "a wrong module", "another base", "rank 0"]
    good = codec.encode(random_adapter(RANK, 1), SCALING)
    files = [good, *(content for kind in kinds if (content := spoilt(kind, good)))]
    with pytest.raises(BadUpdates) as refusal:
        aggregate(
            host.federation,
            1.0,
            StartVersion(0),
            [addend(host, n, c) for n, c in enumerate(files)],
            host.blobs.write,
        )
    assert set(refusal.value.reasons) == {"x1", "x2", "x3", "x4"}
    assert UP in refusal.value.reasons["x1"]
    assert Q in refusal.value.reasons["x2"]
    assert Q in refusal.value.reasons["x4"]


def test_the_digest_of_a_blob_is_that_of_its_bytes(host: Host) -> None:
    digest = host.blobs.write([b"one", b"two"])
    assert digest == hashlib.sha256(b"onetwo").hexdigest()
    assert host.blobs.is_intact(digest)
    host.blobs.path(digest).write_bytes(b"onetwp")
    assert not host.blobs.is_intact(digest)
