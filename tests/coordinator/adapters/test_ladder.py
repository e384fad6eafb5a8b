"""Files of a version for all ranks: one pass, and the bytes that each rank would have by itself."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.adapters.ladder import Rung, file_name, rungs, write_rungs
from coordinator.storage.blobs import Blobs
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.adapter_file.dtypes import WIRE_DTYPES, WireDtype
from edge_sdk.core.errors import AdapterError
from edge_sdk.core.flexlora import combine, serve
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import OWN_RULES, Base, Federation, Training
from tests.coordinator.devices import FINGERPRINT, SCALING, SHAPES
from tests.edge_sdk.core.draws import factors

CAP = 12
LADDER = (1, 2, 4, 8)
FEDERATION = Federation(
    "f-1", Base("made of numpy", FINGERPRINT, SHAPES), "flexlora", LADDER, CAP, SCALING, "balanced"
)
ALL = [Rung(rank, dtype) for dtype in WIRE_DTYPES for rank in (*LADDER, CAP)]


def version(live: int, seed: int = 0) -> dict[str, LoraFactors]:
    """A stored version of this live rank, as a merge leaves it."""
    draw = np.random.default_rng(seed)
    made = {}
    for name, (out, inp) in SHAPES.items():
        made[name] = combine(
            [(1.0, factors(draw, out, inp, min(live, out, inp)))], min(CAP, out, inp)
        ).factors
    return made


def stored(blobs: Blobs, adapter: Mapping[str, LoraFactors]) -> Path:
    return blobs.path(blobs.write([codec.encode(adapter, SCALING)]))


def files(blobs: Blobs, number: int = 1) -> dict[Rung, bytes]:
    found = {rung: blobs.cached(file_name(FEDERATION, number, rung)) for rung in ALL}
    return {rung: path.read_bytes() for rung, path in found.items() if path.exists()}


@given(live=st.integers(1, CAP), seed=st.integers(0, 99), number=st.integers(1, 3))
@settings(max_examples=25)
def test_every_file_is_what_its_rank_would_have_alone(
    tmp_path_factory: pytest.TempPathFactory, live: int, seed: int, number: int
) -> None:
    """Against the whole file encoded by itself, from factors that were cut before they were split."""
    blobs = Blobs(tmp_path_factory.mktemp("ladder"))
    adapter = version(live, seed)
    write_rungs(FEDERATION, number, stored(blobs, adapter), ALL, blobs.caching)
    read = {n: LoraFactors((f.b / SCALING) * np.float32(SCALING), f.a) for n, f in adapter.items()}
    for rung, content in files(blobs, number).items():
        alone = {
            name: serve(f, min(rung.rank, *f.shape), "balanced", f"f-1/{number}/{name}")
            for name, f in read.items()
        }
        assert content == codec.encode(alone, SCALING, rung.dtype), rung
    assert len(files(blobs, number)) == len(ALL)


def test_version_0_is_fresh_rows_at_every_rank(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    write_rungs(FEDERATION, 0, None, ALL, blobs.caching)
    path = tmp_path / "served"
    for rung, content in files(blobs, 0).items():
        path.write_bytes(content)
        cap = codec.max_adapter_bytes(SHAPES, rung.rank, rung.dtype)
        for name, f in codec.open_adapter(path, SHAPES, rung.rank, SCALING, cap).modules():
            assert f.rank == min(rung.rank, *SHAPES[name])
            assert not f.b.any()
            assert f.a.any(axis=1).all()


def test_the_stored_factors_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = Blobs(tmp_path)
    current = stored(blobs, version(6))
    read: list[str] = []
    modules = codec.AdapterFile.modules

    def counted(self: codec.AdapterFile) -> Iterator[tuple[str, LoraFactors]]:
        for name, f in modules(self):
            read.append(name)
            yield name, f

    monkeypatch.setattr(codec.AdapterFile, "modules", counted)
    write_rungs(FEDERATION, 1, current, ALL, blobs.caching)
    assert read == sorted(SHAPES)


MAKE_AGAIN = """
import sys
from pathlib import Path
from coordinator.storage.blobs import Blobs
from coordinator.adapters.ladder import write_rungs
from tests.coordinator.adapters.test_ladder import ALL, FEDERATION
write_rungs(FEDERATION, 1, Path(sys.argv[2]), ALL[int(sys.argv[3])::2], Blobs(Path(sys.argv[1])).caching)
"""


def test_made_again_after_the_cache_was_lost_it_has_the_same_bytes(tmp_path: Path) -> None:
    """In this process and, half of the files at a time, in two others."""
    blobs = Blobs(tmp_path)
    current = stored(blobs, version(6))
    write_rungs(FEDERATION, 1, current, ALL, blobs.caching)
    first = files(blobs)
    assert len(first) == len(ALL)
    for turn in ("here", "elsewhere"):
        for path in (tmp_path / "cache").iterdir():
            path.unlink()
        if turn == "here":
            write_rungs(FEDERATION, 1, current, ALL[::-1], blobs.caching)
        for half in "01" if turn == "elsewhere" else "":
            command = [sys.executable, "-c", MAKE_AGAIN, str(tmp_path), str(current), half]
            subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parents[3])
        assert files(blobs) == first


def test_a_module_that_does_not_fit_leaves_no_file(tmp_path: Path) -> None:
    """The last of the modules, when the others are written already; what was there before stays."""
    blobs = Blobs(tmp_path)
    adapter = version(4)
    write_rungs(FEDERATION, 1, stored(blobs, adapter), [Rung(2)], blobs.caching)
    last = sorted(SHAPES)[-1]
    huge = LoraFactors(adapter[last].b * np.float32(1e9), adapter[last].a * np.float32(1e9))
    spoilt = stored(blobs, adapter | {last: huge})
    with pytest.raises(AdapterError, match=f"module {last} exceeds float16"):
        write_rungs(FEDERATION, 1, spoilt, [Rung(4), Rung(4, "float16")], blobs.caching)
    assert list(files(blobs)) == [Rung(2)]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [file_name(FEDERATION, 1, Rung(2))]


@pytest.mark.parametrize("rule", OWN_RULES)
@pytest.mark.parametrize("sparse_versions", [0, 2])
def test_a_file_that_is_made_alone_is_the_one_of_the_ladder(
    tmp_path: Path, rule: str, sparse_versions: int
) -> None:
    """Under every rule, and in the sparse warm-up, where what is served is a product."""
    training = Training(sparse_versions=sparse_versions)
    of = dataclasses.replace(FEDERATION, rule=rule, training=training, download_dtype="int8")
    together, alone = Blobs(tmp_path / "together"), Blobs(tmp_path / "alone")
    current = stored(together, version(6))
    wanted = [Rung(rank, "int8") for rank in LADDER]
    write_rungs(of, 1, current, wanted, together.caching)
    for rung in wanted:
        write_rungs(of, 1, current, [rung], alone.caching)
        name = file_name(of, 1, rung)
        assert alone.cached(name).read_bytes() == together.cached(name).read_bytes(), rung


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_the_ranks_that_devices_will_ask_for(dtype: WireDtype) -> None:
    of = dataclasses.replace(FEDERATION, download_dtype=dtype)
    assert rungs(of, 7) == tuple(Rung(rank, dtype) for rank in LADDER)
    carrying = dataclasses.replace(of, rule="carry")
    assert rungs(carrying, 5) == (Rung(5, dtype),)
    assert rungs(carrying, 11) == (Rung(6, dtype), Rung(9, dtype), Rung(11, dtype))  # ½, ¾ and all of 12
    assert rungs(carrying, 0) == ()
