"""Files by digest, and uploads that grow at their end alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from coordinator.storage.blobs import Blobs
from edge_sdk.core.errors import InternalError, OffsetConflict, ProtocolError, TooLarge

DATA = b"0123456789"
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_blob_lies_under_its_digest(blobs: Blobs, tmp_path: Path) -> None:
    assert blobs.write([DATA[:3], DATA[3:]]) == DIGEST
    assert blobs.path(DIGEST).read_bytes() == DATA
    assert files(tmp_path) == [f"blobs/{DIGEST[:2]}/{DIGEST}"]
    assert blobs.write([DATA]) == DIGEST


def test_a_write_that_breaks_leaves_nothing(blobs: Blobs, tmp_path: Path) -> None:
    def chunks() -> object:
        yield DATA
        raise OSError("the source broke")

    with pytest.raises(InternalError, match="the source broke"):
        blobs.write(chunks())  # type: ignore[arg-type]
    with pytest.raises(InternalError, match="the source broke"), blobs.caching("file") as file:
        file.writelines(chunks())  # type: ignore[arg-type]
    assert files(tmp_path) == []


def test_a_cached_file_is_replaced_whole(blobs: Blobs) -> None:
    with blobs.caching("file") as file:
        file.write(b"old")
        assert not blobs.cached("file").exists()
    assert blobs.cached("file").read_bytes() == b"old"
    with blobs.caching("file") as file:
        file.writelines([b"n", b"ew"])
        assert blobs.cached("file").read_bytes() == b"old"
    assert blobs.cached("file").read_bytes() == b"new"


def test_an_upload_grows_at_its_end(blobs: Blobs) -> None:
    assert blobs.offset("u") == 0
    assert blobs.append("u", 0, DATA[:4], 10) == 4
    assert blobs.append("u", 4, DATA[4:], 10) == 10
    assert blobs.offset("u") == 10
    assert blobs.finish("u", DIGEST).read_bytes() == DATA
    assert blobs.offset("u") == 0


@pytest.mark.parametrize("offset", [0, 3, 5, 10**12])
def test_the_wrong_offset_is_refused_with_the_right_one(blobs: Blobs, offset: int) -> None:
    blobs.append("u", 0, DATA[:4], 10)
    with pytest.raises(OffsetConflict, match="4 bytes are stored") as refusal:
        blobs.append("u", offset, b"x", 100)
    assert refusal.value.details == {"offset": 4}
    assert blobs.offset("u") == 4


def test_the_cap_holds_and_nothing_over_it_is_written(blobs: Blobs) -> None:
    blobs.append("u", 0, DATA, 12)
    with pytest.raises(TooLarge, match="exceeds the 12 bytes"):
        blobs.append("u", 10, b"abc", 12)
    assert blobs.offset("u") == 10
    assert blobs.append("u", 10, b"ab", 12) == 12


def test_other_bytes_than_promised_are_dropped(blobs: Blobs, tmp_path: Path) -> None:
    blobs.append("u", 0, b"forged", 10)
    with pytest.raises(ProtocolError, match=f"not {DIGEST[:12]}…; upload again"):
        blobs.finish("u", DIGEST)
    assert files(tmp_path) == []
    blobs.append("u", 0, DATA, 10)
    assert blobs.finish("u", DIGEST).exists()


def test_finishing_twice_is_finishing_once(blobs: Blobs, tmp_path: Path) -> None:
    blobs.append("u", 0, DATA, 10)
    first = blobs.finish("u", DIGEST)
    assert blobs.finish("u", DIGEST) == first
    blobs.append("u", 0, DATA, 10)  # a device that heard no answer sends it all again
    assert blobs.finish("u", DIGEST) == first
    assert files(tmp_path) == [f"blobs/{DIGEST[:2]}/{DIGEST}"]


def test_finishing_what_never_came_is_refused(blobs: Blobs) -> None:
    with pytest.raises(ProtocolError, match="nothing was uploaded"):
        blobs.finish("u", DIGEST)


def test_discarding_forgets(blobs: Blobs) -> None:
    blobs.append("u", 0, DATA, 10)
    blobs.discard("u")
    blobs.discard("u")
    assert blobs.offset("u") == 0


@pytest.mark.parametrize(
    "id", ["", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b", "a.part", "x" * 65, "u\n"]
)
def test_an_id_of_another_form_is_refused(blobs: Blobs, tmp_path: Path, id: str) -> None:
    for attempt in (
        lambda: blobs.offset(id),
        lambda: blobs.append(id, 0, DATA, 10),
        lambda: blobs.finish(id, DIGEST),
        lambda: blobs.discard(id),
    ):
        with pytest.raises(ProtocolError, match="is not an upload id"):
            attempt()
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "digest", ["", "../" * 21 + "x", DIGEST.upper(), DIGEST[:-1], DIGEST + "\n", "g" * 64]
)
def test_a_digest_of_another_form_is_refused(blobs: Blobs, digest: str) -> None:
    with pytest.raises(ProtocolError, match="is not a SHA-256"):
        blobs.path(digest)
