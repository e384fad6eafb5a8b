"""Updates that change too much, over HTTP: clipped or refused, and what their devices do then."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import AdapterError, InputError
from edge_sdk.core.flexlora import live_rank
from edge_sdk.core.lora import Adapter, LoraFactors
from edge_sdk.core.messages import Ask, NotNow
from tests.coordinator.devices import SCALING, SHAPES, Device, configuration, member, random_adapter
from tests.edge_sdk.core.draws import dense
from tests.processes import PATIENCE_S, CoordinatorProcess

POLICY: dict[str, object] = {"buffer_size": 3, "staleness": "constant"}


def norm(adapter: Adapter) -> float:
    """Over all modules, from the dense products."""
    return float(np.linalg.norm([np.linalg.norm(f.product()) for f in adapter.values()]))


def scaled(adapter: Adapter, times: float) -> dict[str, LoraFactors]:
    return {name: LoraFactors(f.b * np.float32(times), f.a) for name, f in adapter.items()}


def joined(one: LoraFactors, two: LoraFactors) -> LoraFactors:
    """Factors of the sum."""
    return LoraFactors(np.hstack([one.b, two.b]), np.vstack([one.a, two.a]))


def wait_for(device: Device, version: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while device.status().version < version:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stored(folder: Path, number: int) -> Adapter:
    """A published version as the coordinator keeps it."""
    with sqlite3.connect(folder / "coordinator.sqlite") as database:
        ((digest,),) = database.execute("SELECT digest FROM versions WHERE version = ?", (number,))
    return dict(codec.open_own(folder / "blobs" / digest[:2] / digest, SCALING).modules())


def close_to(found: Adapter, parts: list[tuple[float, Adapter]]) -> None:
    """Every module is the weighted sum of these, within the rank cap."""
    for name, shape in SHAPES.items():
        expected = dense([(weight, adapter[name]) for weight, adapter in parts])
        u, s, vt = np.linalg.svd(expected, full_matrices=False)
        kept = min(12, *shape)
        best = (u[:, :kept] * s[:kept]) @ vt[:kept]
        np.testing.assert_allclose(found[name].product(), best, atol=2e-5 * float(s[0]))


def test_a_change_that_is_too_long_is_clipped_and_the_bound_survives_a_restart(tmp_path: Path) -> None:
    adapters = [random_adapter(4, 1), random_adapter(4, 2), scaled(random_adapter(4, 3), 100.0)]
    bound = 5.0 * min(norm(adapters[0]), norm(adapters[1]))
    config = configuration(tmp_path, POLICY, history_least=2)
    with (
        CoordinatorProcess(tmp_path, config) as coordinator,
        member(coordinator, "one") as one,
        member(coordinator, "two") as two,
        member(coordinator, "three") as three,
    ):
        assert one.status().norm_bound is None
        for device, adapter in zip((one, two), adapters, strict=False):
            device.hand_in(device.work(), codec.encode(adapter, SCALING))
        coordinator.kill()
        coordinator.start()
        assert one.status().norm_bound == pytest.approx(bound, rel=1e-4)
        three.hand_in(three.work(), codec.encode(adapters[2], SCALING))
        wait_for(one, 1)
        assert (one.status().clipped, one.status().refused) == (1, 0)
        shorter = scaled(adapters[2], bound / norm(adapters[2]))
        close_to(stored(coordinator.data, 1), [(1 / 3, a) for a in (*adapters[:2], shorter)])
        # The clipped update counts with the norm that is left of it.
        assert one.status().norm_bound == pytest.approx(
            5.0 * sorted([norm(adapters[0]), norm(adapters[1]), bound])[1], rel=1e-4
        )


def test_a_state_is_clipped_towards_what_its_device_began_with(tmp_path: Path) -> None:
    """Rule flexlora: the change is the state less its start, and only that is made shorter."""
    config = configuration(tmp_path, POLICY, rule="flexlora", history_least=3, norm_factor=2.0)
    with (
        CoordinatorProcess(tmp_path, config) as coordinator,
        member(coordinator, "one") as one,
        member(coordinator, "two") as two,
        member(coordinator, "three") as three,
    ):
        devices = (one, two, three)
        for seed, device in enumerate(devices):
            device.hand_in(device.work(), codec.encode(scaled(random_adapter(4, seed), 50.0), SCALING))
        wait_for(one, 1)
        first = stored(coordinator.data, 1)
        begun = {n: f.leading(min(4, live_rank(f))) for n, f in first.items()}
        ends, changes = [], []
        for seed, times in enumerate((1.0, 1.0, 1000.0)):
            learnt = scaled(random_adapter(1, 10 + seed), times)  # in place of the fourth component
            end = {n: joined(f.leading(3), learnt[n]) for n, f in begun.items()}
            ends.append(end)
            changes.append(norm({n: joined(end[n], LoraFactors(-f.b, f.a)) for n, f in begun.items()}))
        for device, end in zip(devices, ends, strict=True):
            device.hand_in(device.work(), codec.encode(end, SCALING))
        wait_for(one, 2)
        with sqlite3.connect(coordinator.data / "coordinator.sqlite") as database:
            factors = [f for (f,) in database.execute("SELECT factor FROM updates ORDER BY rowid")]
        assert factors[:5] == [1.0] * 5
        assert 0 < factors[5] < 0.5
        # The bound is that of the first version, and moves slowly from there.
        middle = sorted(norm(scaled(random_adapter(4, seed), 50.0)) for seed in range(3))[1]
        assert factors[5] == pytest.approx(2.0 * middle / changes[2], rel=1e-3)
        third = [(factors[5] / 3, ends[2]), ((1 - factors[5]) / 3, begun)]
        close_to(stored(coordinator.data, 2), [(1 / 3, ends[0]), (1 / 3, ends[1]), *third])


def test_a_refused_device_hears_why_waits_a_moment_and_gets_other_work(tmp_path: Path) -> None:
    config = configuration(tmp_path, POLICY, history_least=2, over_norm="refuse")
    with (
        CoordinatorProcess(tmp_path, config) as coordinator,
        member(coordinator, "one") as one,
        member(coordinator, "two") as two,
        member(coordinator, "three") as three,
    ):
        for seed, device in enumerate((one, two)):
            device.hand_in(device.work(), seed=seed)
        work = three.work()
        long = codec.encode(scaled(random_adapter(4, 3), 100.0), SCALING)
        for _ in range(3):
            with pytest.raises(AdapterError, match=r"above the .*module model\.layers\.0\.up_proj alone by"):
                three.hand_in(work, long)
        answer = three.transport.ask(Ask(4))
        assert isinstance(answer, NotNow)
        assert "refused" in answer.reason
        deadline = time.monotonic() + PATIENCE_S
        while isinstance(answer, NotNow):
            assert time.monotonic() < deadline
            time.sleep(0.1)
            answer = three.transport.ask(Ask(4))
        assert answer.id != work.id
        assert answer.seed != work.seed
        three.hand_in(answer, seed=4)
        wait_for(one, 1)
        status = one.status()
        assert (status.clipped, status.refused) == (0, 3)
        assert coordinator.stop() == 0
        log = coordinator.log.read_text()
        assert "Traceback" not in log, log


def test_an_unknown_or_unusable_setting_is_refused_by_name(tmp_path: Path) -> None:
    from coordinator.settings import load_settings

    file = tmp_path / "config.toml"
    for settings, wrong in (
        ({"over_norms": "clip"}, r"unknown key 'admission\.over_norms'"),
        ({"over_norm": "ignore"}, "admission.over_norm"),
        ({"norm_factor": 0.5}, "admission.norm_factor is 0.5"),
        ({"robust": "krum"}, "admission.robust"),
    ):
        file.write_text(configuration(tmp_path, **settings))  # type: ignore[arg-type]
        with pytest.raises(InputError, match=wrong):
            load_settings(file)
    file.write_text(configuration(tmp_path, rule="hetlora", robust="trimmed"))
    with pytest.raises(InputError, match='admission.robust is "trimmed", but rule hetlora averages factors'):
        load_settings(file)
