"""How files travel is the host's choice: what is served, capped, and kept of an older data folder."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from coordinator.cli import main
from coordinator.settings import NEW_DTYPE
from edge_sdk.core import messages
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.adapter_file.dtypes import WIRE_DTYPES, WireDtype
from edge_sdk.core.errors import AdapterError, NotFound, TooLarge
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Federation
from edge_sdk.core.records import from_json, to_json
from tests.coordinator.devices import FINGERPRINT, LADDER, SCALING, Device, member
from tests.edge_sdk.core import wire_samples
from tests.processes import MOST_BYTES, CoordinatorProcess, toml
from tests.processes import PATIENCE_S as WAIT_S

# Wide enough that the header, for which a cap is generous, decides nothing.
WIDE = {"model.layers.0.q_proj": (1024, 512), "model.layers.0.up_proj": (2048, 512)}


def wide_adapter(rank: int, seed: int) -> dict[str, LoraFactors]:
    draw = np.random.default_rng(seed)
    made = {}
    for name, (out, inp) in WIDE.items():
        b, a = 0.1 * draw.standard_normal((out, rank)), draw.standard_normal((rank, inp))
        made[name] = LoraFactors(b.astype(np.float32), a.astype(np.float32))
    return made


def wide_configuration(folder: Path, **federation: object) -> str:
    base = folder / "base.json"
    base.write_text(json.dumps({"model": "made of numpy", "fingerprint": FINGERPRINT, "modules": WIDE}))
    sections = {
        "federation": {"rule": "flexlora", "ladder": LADDER, "rank_cap": 12, "scaling": SCALING} | federation,
        "policy": {"buffer_size": 1, "retry_s": 0.1},
        "admission": {"reach_factor": 1e9},  # random adapters are no training
    }
    return toml(sections, base)


@contextlib.contextmanager
def serving(folder: Path, **federation: object) -> Iterator[CoordinatorProcess]:
    with CoordinatorProcess(folder, wide_configuration(folder, **federation)) as process:
        yield process
        assert process.stop() == 0
        log = process.log.read_text()
        assert "Traceback" not in log, log


def publish(device: Device, dtype: WireDtype = "float32") -> dict[str, LoraFactors]:
    """Hand in an update and wait for the version that it makes."""
    sent = wide_adapter(8, 1)
    device.hand_in(device.work(8), codec.encode(sent, SCALING, dtype))
    for _ in range(int(WAIT_S / 0.02)):
        if device.status().version:
            return sent
        time.sleep(0.02)
    raise AssertionError("no version in time")


def get(coordinator: CoordinatorProcess, device: Device, route: str, **headers: str) -> httpx.Response:
    headers["Authorization"] = f"Bearer {device.credential}"
    return httpx.get(coordinator.url + route, headers=headers, timeout=30.0)


def test_every_dtype_is_served_whatever_was_chosen(tmp_path: Path) -> None:
    """The ladder is there in the dtype chosen; PEFT's float32 is there for whoever asks."""
    with (
        serving(tmp_path, download_dtype="int8", upload_dtype="float32") as coordinator,
        member(coordinator) as one,
    ):
        sent = publish(one)
        cache = coordinator.data / "cache"
        for dtype in ("int8", "float16", "float32"):
            path = tmp_path / dtype
            one.transport.download(1, 4, path, dtype=dtype, most_bytes=MOST_BYTES)
            cap = codec.max_adapter_bytes(WIDE, 4, dtype)
            for name, f in codec.open_adapter(path, WIDE, 4, SCALING, cap).modules():
                exact = sent[name].product()
                u, s, vt = np.linalg.svd(exact.astype(np.float64), full_matrices=False)
                best = (u[:, :4] * s[:4]) @ vt[:4]
                assert np.linalg.norm(f.product() - best) < 0.02 * np.linalg.norm(best)
            if dtype == "int8":
                assert sorted(p.name.split("-", 1)[1] for p in cache.iterdir()) == [
                    f"1-{rank}-int8.safetensors" for rank in LADDER
                ]
        plain = get(coordinator, one, messages.ADAPTER.format(version=1, rank=4)).content
        assert plain == (tmp_path / "float32").read_bytes()
        assert len((tmp_path / "int8").read_bytes()) < 0.3 * len(plain)


def test_a_file_in_int8_is_immutable_and_can_be_had_in_parts(tmp_path: Path) -> None:
    with serving(tmp_path, download_dtype="int8") as coordinator, member(coordinator) as one:
        route = messages.ADAPTER_IN.format(version=0, rank=4, dtype="int8")
        whole = get(coordinator, one, route)
        assert "immutable" in whole.headers["Cache-Control"]
        part = get(coordinator, one, route, Range="bytes=100-299")
        assert (part.status_code, part.content) == (206, whole.content[100:300])
        tag = {"If-None-Match": whole.headers["ETag"]}
        assert get(coordinator, one, route, **tag).status_code == 304
        for path in (coordinator.data / "cache").iterdir():
            path.unlink()  # lost, and made again
        assert get(coordinator, one, route).content == whole.content


def test_an_unknown_dtype_is_not_there(tmp_path: Path) -> None:
    with serving(tmp_path) as coordinator, member(coordinator) as one:
        for dtype in ("int4", "F32", "..%2f..%2fjoin-token"):
            answer = get(coordinator, one, f"/v1/versions/0/ranks/4/{dtype}/adapter.safetensors")
            assert answer.status_code == 404, dtype
        with pytest.raises(NotFound, match="rank 13 is not served"):
            one.transport.download(0, 13, tmp_path / "x", dtype="int8", most_bytes=MOST_BYTES)


@pytest.mark.parametrize("chosen", WIRE_DTYPES)
def test_any_dtype_is_taken_up_to_the_bytes_of_the_chosen_one(tmp_path: Path, chosen: WireDtype) -> None:
    bytes_of = {dtype: len(codec.encode(wide_adapter(8, 1), SCALING, dtype)) for dtype in WIRE_DTYPES}
    with serving(tmp_path, upload_dtype=chosen) as coordinator:
        for dtype in WIRE_DTYPES:
            with member(coordinator, dtype) as one:
                if bytes_of[dtype] <= bytes_of[chosen]:
                    publish(one, dtype)
                else:
                    with pytest.raises(TooLarge, match="bytes that its rank needs"):
                        publish(one, dtype)


def test_what_int8_decodes_to_must_be_finite_and_small(tmp_path: Path) -> None:
    with serving(tmp_path, upload_dtype="int8") as coordinator, member(coordinator) as one:
        name = next(iter(WIDE))
        sent = wide_adapter(8, 1)
        huge = sent | {name: LoraFactors(sent[name].b * np.float32(1e30), sent[name].a)}
        with pytest.raises(AdapterError, match=f"module {name} has norm"):
            one.hand_in(one.work(8), codec.encode(huge, SCALING, "int8"))


def test_what_is_exported_is_peft_s_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path, download_dtype="int8") as coordinator, member(coordinator) as one:
        publish(one, "int8")
        data = coordinator.data
    out = tmp_path / "exported"
    assert main(["export", "--data", str(data), "--rank", "4", "--out", str(out)]) == 0
    assert "at rank 4 written" in capsys.readouterr().out
    raw = (out / "adapter_model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F32"}


# --- settings -------------------------------------------------------------------------------------


def test_a_new_federation_says_how_files_travel(tmp_path: Path) -> None:
    with serving(tmp_path, download_dtype="float16") as coordinator, member(coordinator) as one:
        federation = one.transport.federation()
        assert (federation.download_dtype, federation.upload_dtype) == ("float16", NEW_DTYPE)


def test_a_federation_that_began_before_keeps_float32(tmp_path: Path) -> None:
    """Its record lacks the fields: no setting contradicts it, and its devices send what they always sent."""
    with serving(tmp_path) as coordinator:
        pass
    database = coordinator.data / "coordinator.sqlite"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        ((text,),) = connection.execute("SELECT value FROM meta WHERE key = 'federation'")
        record = json.loads(text)
        assert record.pop("download_dtype") == record.pop("upload_dtype") == NEW_DTYPE
        connection.execute("UPDATE meta SET value = ? WHERE key = 'federation'", (json.dumps(record),))
    with serving(tmp_path) as coordinator, member(coordinator) as one:
        federation = one.transport.federation()
        assert (federation.download_dtype, federation.upload_dtype) == ("float32", "float32")
        publish(one, "float32")


def test_another_dtype_contradicts_the_data_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path, upload_dtype="float16") as coordinator:
        data = coordinator.data
    config = tmp_path / "other.toml"
    config.write_text(wide_configuration(tmp_path, upload_dtype="int8"))
    assert main(["serve", "--data", str(data), "--config", str(config), "--port", "0"]) == 2
    assert "holds a federation with another upload_dtype" in capsys.readouterr().err


def test_an_unknown_dtype_in_the_settings_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(wide_configuration(tmp_path, download_dtype="int4"))
    assert main(["serve", "--data", str(tmp_path / "data"), "--config", str(config), "--port", "0"]) == 2
    assert "federation.download_dtype: 'int4' is not one of" in capsys.readouterr().err


def test_a_record_of_before_means_float32() -> None:
    record = to_json(wire_samples.FEDERATION)
    del record["download_dtype"], record["upload_dtype"]
    federation = from_json(Federation, record)
    assert (federation.download_dtype, federation.upload_dtype) == ("float32", "float32")
