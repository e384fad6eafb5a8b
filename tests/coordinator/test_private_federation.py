"""Differential privacy through the real coordinator: what it publishes, counts, refuses and remembers."""

from __future__ import annotations

import hashlib
import math
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest

from coordinator.cli import main
from coordinator.merging import aggregation, sources
from coordinator.merging.weighing import Private
from coordinator.privacy import accountant, ledger
from coordinator.privacy.mechanism import Noise, Privacy
from coordinator.storage.blobs import Blobs
from coordinator.storage.store import Store
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import InputError, StaleUpdate
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Ask, Assignment, Base, Federation, NotNow, Status
from tests.coordinator.devices import (
    FINGERPRINT,
    LADDER,
    SCALING,
    SHAPES,
    Device,
    configuration,
    member,
    random_adapter,
)
from tests.coordinator.rules.test_partial_carry import stored, tail_of
from tests.edge_sdk.core.draws import dense
from tests.processes import PATIENCE_S, CoordinatorProcess

pytest.importorskip("dp_accounting")

ENTRIES = sum(out * inp for out, inp in SHAPES.values())


def until_version(device: Device, version: int) -> Status:
    deadline = time.monotonic() + PATIENCE_S
    while (status := device.status()).version < version:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return status


def waiting(device: Device) -> NotNow:
    answer = device.transport.ask(Ask(4))
    assert isinstance(answer, NotNow), answer
    return answer


def test_a_version_is_the_clipped_sum_with_fixed_weights(tmp_path: Path) -> None:
    """With next to no noise: three of K = 4 after the time-out, one of them long, one that carried a part."""
    policy: dict[str, object] = {"buffer_size": 4, "quorum": 3, "timeout_s": 0.2, "staleness": "constant"}
    privacy = {"noise_multiplier": 1e-9, "clip_norm": 3.0}
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path, policy, privacy=privacy)) as coordinator,
        member(coordinator, "a") as a,
        member(coordinator, "b") as b,
        member(coordinator, "c") as c,
    ):
        rounds = []
        for number in range(2):
            done = []
            for place, (device, carried) in enumerate(((a, 99), (b, 99), (c, 2))):
                work = device.transport.ask(Ask(4, carried))
                assert isinstance(work, Assignment)
                adapter = random_adapter(4, 10 * number + place, scale=(0.01, 0.02, 0.5)[place])
                device.hand_in(work, codec.encode(adapter, SCALING))
                done.append((work, adapter))
            until_version(a, number + 1)
            rounds.append(done)
        assert coordinator.stop() == 0
        before, after = stored(coordinator.data, 1), stored(coordinator.data, 2)
    for name in SHAPES:
        total = before[name].product().astype(np.float64)
        for work, adapter in rounds[1]:
            norm = math.sqrt(sum(float(np.sum(dense([(1.0, f)]) ** 2)) for f in adapter.values()))
            change = min(1.0, 3.0 / norm) * dense([(1.0, adapter[name])])
            total += (change - tail_of(before[name], change, work.carry_rank)) / 4
        u, s, vt = np.linalg.svd(total)
        kept = after[name].rank
        np.testing.assert_allclose(after[name].product(), (u[:, :kept] * s[:kept]) @ vt[:kept], atol=1e-5)


def test_the_noise_of_a_version_is_as_large_as_it_says(tmp_path: Path) -> None:
    """‖S + N‖² = ‖N‖² + 2⟨S, N⟩ + ‖S‖², with ‖N‖² = σ²χ² over all entries and here ‖S‖ ≤ σ."""
    z, clip_norm, buffer_size = 2.0, 0.001, 2
    privacy = {"noise_multiplier": z, "clip_norm": clip_norm}
    with (
        CoordinatorProcess(
            tmp_path, configuration(tmp_path, {"buffer_size": buffer_size}, privacy=privacy)
        ) as coordinator,
        member(coordinator, "a") as a,
        member(coordinator, "b") as b,
    ):
        for device in (a, b):
            device.hand_in(device.work())
        status = until_version(a, 1)
        assert status.delta == 1e-5
        assert status.epsilon == pytest.approx(accountant.epsilon({z: 1}, 1e-5))
        assert coordinator.stop() == 0
        with sqlite3.connect(coordinator.data / "coordinator.sqlite") as database:
            row = database.execute("SELECT energy, noise_multiplier, clip_norm FROM versions").fetchone()
    energy, *kept = row
    assert kept == [z, clip_norm]
    variance = (z * clip_norm / buffer_size) ** 2
    tolerance = 6.2 * math.sqrt(2 * ENTRIES) + 2 * 6.2 + 1  # three terms, each within 6.2 standard errors
    assert abs(energy / variance - ENTRIES) <= tolerance


def test_a_budget_ends_outlives_a_restart_and_can_be_raised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = accountant.epsilon({1.0: 2}, 1e-5)
    privacy = {"noise_multiplier": 1.0, "clip_norm": 1.0, "max_epsilon": two + 0.01}
    config = configuration(tmp_path, {"buffer_size": 1}, privacy=privacy)
    with (
        CoordinatorProcess(tmp_path, config) as coordinator,
        member(coordinator, "a") as a,
        member(coordinator, "b") as b,
    ):
        for number in (1, 2):
            a.hand_in(a.work())
            until_version(a, number)
        assert "privacy budget is spent" in waiting(a).reason
        assert waiting(a).retry_after_s >= 60
        work = b.work()  # the others go on
        coordinator.kill()
        coordinator.start()
        assert "privacy budget is spent" in waiting(a).reason
        assert a.status().epsilon == pytest.approx(two)
        b.hand_in(work)
        until_version(b, 3)
        assert b.status().epsilon == pytest.approx(two)  # b entered one version, a is the worst
        coordinator.stop()
        assert "left out" not in coordinator.log.read_text()

        assert main(["status", "--data", str(coordinator.data)]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("privacy"))
        assert line == f"privacy     ε = {two:.3g} at δ = 1e-05 (worst device, 2 versions)"

        privacy["max_epsilon"] = 100.0
        coordinator.config.write_text(configuration(tmp_path, {"buffer_size": 1}, privacy=privacy))
        coordinator.start()
        a.work()


def test_an_update_beyond_the_budget_is_refused_or_left_out(tmp_path: Path) -> None:
    """Refused at the door where the budget went while it was trained; left out where it was lowered since."""
    privacy = {"noise_multiplier": 1.0, "clip_norm": 1.0}
    policy: dict[str, object] = {"buffer_size": 2}
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path, policy, privacy=privacy)) as coordinator,
        member(coordinator, "a") as a,
        member(coordinator, "b") as b,
        member(coordinator, "c") as c,
    ):
        for device in (a, c):
            device.hand_in(device.work())
        until_version(a, 1)
        second = a.work()
        b.hand_in(b.work())
        coordinator.kill()
        low = {**privacy, "max_epsilon": accountant.epsilon({1.0: 1}, 1e-5) + 0.01}
        coordinator.config.write_text(configuration(tmp_path, policy, privacy=low))
        coordinator.start()
        with pytest.raises(StaleUpdate, match="privacy budget is spent"):
            a.hand_in(second)  # its first is in a version, and one is all that is allowed
        assert b.status().buffered == 1
        coordinator.kill()
        coordinator.config.write_text(configuration(tmp_path, policy, privacy={**low, "max_epsilon": 0.01}))
        coordinator.start()
        assert b.status().buffered == 0
        assert coordinator.stop() == 0
        assert "no privacy budget left" in coordinator.log.read_text()


def test_two_updates_of_a_device_go_into_two_versions(tmp_path: Path) -> None:
    policy: dict[str, object] = {"buffer_size": 2, "lease_s": 0.05}
    privacy = {"noise_multiplier": 1.0, "clip_norm": 1.0}
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path, policy, privacy=privacy)) as coordinator,
        member(coordinator, "a") as a,
        member(coordinator, "b") as b,
        member(coordinator, "c") as c,
    ):
        first = a.work()
        for other in (b, c):
            other.hand_in(other.work())
        until_version(a, 1)
        a.hand_in(first)  # its lease has expired; its update still counts
        assert "one of each device" in waiting(a).reason
        assert a.status().buffered == 1
        b.hand_in(b.work())
        assert until_version(a, 2).buffered == 0
        a.hand_in(a.work())
        assert a.status().buffered == 1
        b.hand_in(b.work())
        status = until_version(a, 3)
        assert status.epsilon == pytest.approx(accountant.epsilon({1.0: 3}, 1e-5))
        assert coordinator.stop() == 0


def test_innovation_clips_what_changed_and_not_the_state(tmp_path: Path) -> None:
    """Two states that are long because the version is; one changed a little, the other too much."""
    base = Base("made of numpy", FINGERPRINT, SHAPES)
    federation = Federation("f", base, "innovation", tuple(LADDER), 12, SCALING, "balanced")
    blobs = Blobs(tmp_path)

    def kept(adapter: dict[str, LoraFactors]) -> Path:
        content = codec.encode(adapter, SCALING)
        blobs.append("a", 0, content, len(content))
        digest = hashlib.sha256(content).hexdigest()
        blobs.finish("a", digest)
        return blobs.path(digest)

    first = sources.Addend("u0", 1.0, kept(random_adapter(4, 1, scale=10.0)), 4)
    before = aggregation.aggregate(federation, 1.0, sources.StartVersion(0), [first], blobs.write)
    start = sources.StartVersion(1, blobs.path(before.digest))
    version = dict(codec.open_own(blobs.path(before.digest), SCALING).modules())
    assert math.sqrt(sum(f.norm() ** 2 for f in version.values())) > 100

    addends, expected = [], {name: f.product().astype(np.float64) for name, f in version.items()}
    for seed, size in enumerate((0.001, 0.1)):
        steps = random_adapter(4, 50 + seed, scale=size)
        states = {name: LoraFactors(f.b + steps[name].b, f.a.copy()) for name, f in version.items()}
        changes = {name: steps[name].b.astype(np.float64) @ f.a for name, f in version.items()}
        norm = math.sqrt(sum(float(np.sum(change**2)) for change in changes.values()))
        assert (norm > 0.5) == (size == 0.1)
        for name, change in changes.items():
            expected[name] += min(1.0, 0.5 / norm) * change / 4
        addends.append(sources.Addend(f"u{seed}", 1 / 4, kept(states), 4, start))
    noise = Noise(0.0, 0.5, 0.0, np.zeros)
    found = aggregation.aggregate(federation, 1.0, start, addends, blobs.write, Private(noise))
    after = dict(codec.open_own(blobs.path(found.digest), SCALING).modules())
    for name, total in expected.items():
        np.testing.assert_allclose(after[name].product(), total, atol=1e-4)
        assert after[name].rank == min(12, *SHAPES[name])


# --- the ledger -----------------------------------------------------------------------------------


def test_privacy_is_for_the_life_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(config: str) -> str:
        path = tmp_path / "other.toml"
        path.write_text(config)
        assert main(["serve", "--data", str(coordinator.data), "--config", str(path), "--port", "0"]) == 2
        return capsys.readouterr().err

    for privacy, said in (
        (None, "holds 1 versions without noise; start [privacy] with another folder"),
        ({"noise_multiplier": 1.0, "clip_norm": 1.0}, "holds 1 versions with differential privacy; restore"),
    ):
        folder = tmp_path / str(privacy is None)
        folder.mkdir()
        with (
            CoordinatorProcess(
                folder, configuration(folder, {"buffer_size": 1}, privacy=privacy)
            ) as coordinator,
            member(coordinator) as device,
        ):
            device.hand_in(device.work())
            until_version(device, 1)
            assert coordinator.stop() == 0
        other = {"noise_multiplier": 1.0, "clip_norm": 1.0} if privacy is None else None
        assert said in refused(configuration(folder, {"buffer_size": 1}, privacy=other))


def test_a_folder_without_versions_may_still_choose(tmp_path: Path) -> None:
    store = Store(tmp_path / "c.sqlite")
    ledger.open_ledger(store, None, tmp_path)
    assert ledger.choices(store) is None
    chosen = Privacy(1.0, 2.0, 1e-6, None)
    ledger.open_ledger(store, chosen, tmp_path)
    assert ledger.choices(store) == chosen
    assert str(ledger.worst(store, 1e-6)) == "ε = 0 at δ = 1e-06 (worst device, 0 versions)"
    store.close()


def test_settings_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    from coordinator.settings import load_settings

    path = tmp_path / "c.toml"
    for text, said in (
        ("[privacy]\nnoise_multiplier = 1.0", "privacy.clip_norm is missing"),
        ("[privacy]\nnoise_multiplier = 0\nclip_norm = 1.0", "privacy.noise_multiplier is 0.0"),
        ("[privacy]\nnoise_multiplier = 1\nclip_norm = 1.0\nseed = 3", "unknown key 'privacy.seed'"),
        (
            "[admission]\nrobust = 'trimmed'\n[privacy]\nnoise_multiplier = 1\nclip_norm = 1.0",
            r"\[admission\] goes by the updates of other devices",
        ),
        (
            "[federation]\nrule = 'flexlora'\n[privacy]\nnoise_multiplier = 1\nclip_norm = 1.0",
            r"\[privacy\] needs federation.rule 'carry' or 'innovation', not 'flexlora'",
        ),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            load_settings(path)
