"""Digests worked out on the way are those of the bytes, or are not known; never anything else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.storage.blobs import Blobs
from coordinator.storage.running_digests import RunningDigests
from edge_sdk.core.errors import ProtocolError

CONTENT = bytes(range(256)) * 4


@given(st.lists(st.lists(st.binary(max_size=40), max_size=3), max_size=6))
def test_however_the_bytes_come_the_digest_is_theirs(batches: list[list[bytes]]) -> None:
    digests, content = RunningDigests(), b""
    for pieces in batches:
        digests.extend("u", len(content), pieces)
        content += b"".join(pieces)
        assert digests.of("u", len(content)) == hashlib.sha256(content).hexdigest()
    assert digests.of("u", len(content) + 1) is None


def test_a_gap_makes_it_unknown_and_a_new_beginning_known() -> None:
    digests = RunningDigests()
    digests.extend("u", 0, [b"abc"])
    digests.extend("u", 5, [b"fg"])  # two bytes came another way
    assert digests.of("u", 7) is None
    digests.extend("u", 7, [b"h"])
    assert digests.of("u", 8) is None
    digests.extend("u", 0, [b"xyz"])
    assert digests.of("u", 3) == hashlib.sha256(b"xyz").hexdigest()
    digests.forget("u")
    assert digests.of("u", 3) is None


def test_the_oldest_are_forgotten() -> None:
    digests = RunningDigests(kept=2)
    for id in "abc":
        digests.extend(id, 0, [b"x"])
    assert [digests.of(id, 1) is None for id in "abc"] == [True, False, False]


def test_a_restart_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    Blobs(tmp_path).append("u", 0, CONTENT[:500], 2000)
    blobs = Blobs(tmp_path)  # knows nothing of the first half
    blobs.append("u", 500, [CONTENT[500:600], CONTENT[600:]], 2000)
    assert blobs.finish("u", digest).read_bytes() == CONTENT


def test_bytes_that_came_behind_its_back_count(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    blobs.append("u", 0, CONTENT[:-1], 2000)
    with blobs.upload_path("u").open("ab") as file:  # as a write that a full disk cut short
        file.write(b"?")
    with pytest.raises(ProtocolError, match="SHA-256"):
        blobs.finish("u", hashlib.sha256(CONTENT[:-1]).hexdigest())
    assert blobs.offset("u") == 0
