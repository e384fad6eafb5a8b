"""Adapter files on the device: which are of a lost history, how they are named, and what is kept of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_sdk.core.adapter_file.codec import encode
from edge_sdk.core.errors import ProtocolError
from edge_sdk.core.lora import LoraFactors
from edge_sdk.membership.adapter_cache import AdapterCache, AdapterKey
from edge_sdk.options import Options

ONES = encode({"layer": LoraFactors(np.ones((3, 2), np.float32), np.ones((2, 5), np.float32))}, 1.0)


class Downloads:
    """Writes an adapter wherever it is told to, and remembers what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def download(self, version: int, rank: int, path: Path, *_: Any, most_bytes: int) -> None:
        self.asked.append((version, rank))
        path.write_bytes(ONES)


@pytest.fixture
def downloads() -> Downloads:
    return Downloads()


@pytest.fixture
def published(tmp_path: Path, downloads: Downloads) -> AdapterCache:
    federation = SimpleNamespace(
        id="f+",
        download_dtype="float32",
        scaling=1.0,
        rank_cap=8,
        base=SimpleNamespace(modules={"layers.0.q": (4, 6)}),
    )
    membership: Any = SimpleNamespace(federation=federation, transport=downloads, options=Options())
    return AdapterCache(membership, tmp_path / "adapters")


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "adapters").iterdir()}


def test_another_history_is_another_file(
    published: AdapterCache, downloads: Downloads, tmp_path: Path
) -> None:
    published.have(AdapterKey(12, 4, "aa"), "work")
    published.have(AdapterKey(12, 4, "aa"), "work")
    published.have(AdapterKey(12, 4, "bb"), "answer")
    assert downloads.asked == [(12, 4), (12, 4)]
    assert names(tmp_path) == {"f+-12-4-aa.safetensors", "f+-12-4-bb.safetensors"}
    assert published.newest_on_disk() == AdapterKey(12, 4, "bb")


def test_a_coordinator_that_names_no_start_gives_the_names_of_before(
    published: AdapterCache, tmp_path: Path
) -> None:
    published.have(AdapterKey(3, 8), "work")
    assert names(tmp_path) == {"f+-3-8.safetensors"}
    assert published.newest_on_disk() == AdapterKey(3, 8)


def test_what_a_restored_coordinator_lost_is_forgotten(published: AdapterCache, tmp_path: Path) -> None:
    """Version 9 is the newest now: 12 went, the other 9 went, 8 stays; what is trained from stays, too."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    for name in ("f+-12-4-aa", "f+-9-4-aa", "f+-9-4-cc", "f+-8-4-aa", "other-12-4-aa"):
        (folder / f"{name}.safetensors").write_bytes(ONES)
    published.heard(AdapterKey(9, 4, "cc"))
    assert names(tmp_path) == {f"{name}.safetensors" for name in ("f+-9-4-cc", "f+-8-4-aa", "other-12-4-aa")}
    published.have(AdapterKey(11, 4, "dd"), "work")
    published.heard(AdapterKey(9, 4, "cc"))
    assert "f+-11-4-dd.safetensors" in names(tmp_path)


def test_old_files_and_parts_go_and_the_newest_stays(published: AdapterCache, tmp_path: Path) -> None:
    published.have(AdapterKey(5, 4, "aa"), "answer")
    for name in ("f+-2-4-bb.safetensors", "f+-4-4-bb.safetensors.part", "f+-4-4-bb.safetensors.part.etag"):
        (tmp_path / "adapters" / name).write_bytes(b"x")
    published.have(AdapterKey(3, 4, "cc"), "work")
    assert names(tmp_path) == {"f+-5-4-aa.safetensors", "f+-3-4-cc.safetensors"}


@pytest.mark.parametrize("start", ["../../etc/passwd", "AA", "x", "a" * 65, "a b", "aa\n"])
def test_a_start_that_is_no_beginning_of_a_digest_is_refused(start: str) -> None:
    with pytest.raises(ProtocolError, match="is not the beginning of a SHA-256"):
        AdapterKey(1, 4, start)
