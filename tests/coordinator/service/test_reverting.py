"""Going back to an older version: over a running coordinator, without one, and what becomes of work since."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from coordinator.engine.engine import Engine
from coordinator.engine.events import (
    Accept,
    Asked,
    Beat,
    Buffered,
    Decline,
    Grant,
    Joined,
    Merge,
    Merged,
    MergeFailed,
    Offered,
    Published,
    Restarted,
    Revert,
    RevertWanted,
    Stored,
    Tell,
    Tick,
)
from coordinator.engine.policy import Policy
from edge_sdk.core.errors import StaleUpdate
from tests.coordinator.adapters.test_door import stored, wait_for
from tests.coordinator.devices import configuration, member
from tests.faults.outside import rows
from tests.processes import CoordinatorProcess, environment

POLICY: dict[str, object] = {"buffer_size": 1, "staleness": "constant", "least_version_s": 0.0}


def going_back(data: Path, to: int) -> subprocess.CompletedProcess[str]:
    return command("revert", data, "--to", str(to))


def command(name: str, data: Path, *options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "coordinator.cli", name, "--data", str(data), *options]
    return subprocess.run(line, check=False, capture_output=True, text=True, env=environment(), timeout=150)


# --- the engine ---


def granted(engine: Engine, device: str, assignment: str, now: float) -> int:
    answer = engine.handle(Asked(device, 4, assignment), now).answer
    assert isinstance(answer, Grant)
    return answer.lease.version


def learnt(engine: Engine, device: str, now: float) -> None:
    """One version more, of one update of this device."""
    version = granted(engine, device, f"{device}-{now}", now)
    done = engine.handle(Stored(Buffered(f"{device}-{now}", device, version, 1)), now)
    (merge,) = done.effects
    assert isinstance(merge, Merge)
    engine.handle(Merged(merge.version, 4), now)


def test_work_from_versions_in_between_counts_no_more_and_from_others_it_does() -> None:
    engine = Engine(Policy(buffer_size=1, least_version_s=0.0))
    for device in ("early", "amid", "fast"):
        engine.handle(Joined(device), 0.0)
    learnt(engine, "fast", 1.0)
    assert granted(engine, "early", "e", 2.0) == 1
    learnt(engine, "fast", 3.0)
    assert granted(engine, "amid", "m", 4.0) == 2
    learnt(engine, "fast", 5.0)
    done = engine.handle(RevertWanted(1), 6.0)
    assert done.effects == (Revert(4, 1),)
    assert engine.handle(RevertWanted(1), 6.0).effects == ()  # it is under way
    assert engine.handle(Merged(4, 4, reverts_to=1), 7.0).effects == (Published(4),)
    assert engine.state.version == 4
    assert engine.handle(Beat("amid", "m", 2, 1), 8.0).answer == Tell("abandon")
    answer = engine.handle(Offered("amid", "m", 2), 8.0).answer
    assert isinstance(answer, Decline)
    assert "which the host took back. Train from version 4" in str(answer.error)
    assert engine.handle(Offered("early", "e", 1), 8.0).answer == Accept()
    assert granted(engine, "fast", "f", 9.0) == 4


def test_buffered_updates_from_between_are_dropped_and_a_restart_remembers() -> None:
    engine = Engine(Policy(buffer_size=3, least_version_s=0.0))
    kept, gone = Buffered("k", "kept", 1, 1), Buffered("g", "gone", 2, 1)
    engine.handle(Restarted(version=3, rank=4, buffer=(kept, gone)), 0.0)
    engine.handle(RevertWanted(1), 1.0)
    declined, published = engine.handle(Merged(4, 4, reverts_to=1), 2.0).effects
    assert isinstance(declined, Decline)
    assert (declined.update, published) == ("g", Published(4))
    assert engine.state.buffer == [kept]
    again = Engine(Policy(buffer_size=3))
    began = Restarted(version=4, rank=4, buffer=(kept, gone), taken_back=((1, 4),))
    (declined,) = again.handle(began, 0.0).effects  # a crash came before it was left out on disk
    assert isinstance(declined, Decline)
    assert (declined.update, again.state.buffer) == ("g", [kept])
    assert isinstance(again.handle(Offered("gone", "x", 3), 1.0).answer, Decline)
    assert again.handle(Offered("kept", "y", 4), 1.0).answer == Accept()


def test_a_wish_waits_for_a_merge_that_is_under_way_and_for_the_pause_after_a_failure() -> None:
    engine = Engine(Policy(buffer_size=1, least_version_s=0.0))
    engine.handle(Joined("d"), 0.0)
    learnt(engine, "d", 1.0)
    version = granted(engine, "d", "a", 2.0)
    (merge,) = engine.handle(Stored(Buffered("a", "d", version, 1)), 2.0).effects
    assert isinstance(merge, Merge)
    assert engine.handle(RevertWanted(0), 2.0).effects == ()
    engine.handle(Merged(2, 4), 3.0)
    assert engine.handle(RevertWanted(0), 3.0).effects == (Revert(3, 0),)
    engine.handle(MergeFailed(), 4.0)
    assert engine.handle(RevertWanted(0), 4.5).effects == ()
    assert engine.handle(RevertWanted(0), 6.0).effects == (Revert(3, 0),)
    assert engine.handle(Tick(), 6.0).effects == ()


# --- real processes ---


@pytest.mark.parametrize("rule", ["carry", "flexlora"])
def test_over_a_running_coordinator_the_old_content_comes_back(tmp_path: Path, rule: str) -> None:
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path, POLICY, rule=rule)) as coordinator,
        member(coordinator, "one") as one,
        member(coordinator, "two") as two,
    ):
        one.hand_in(one.work(), seed=1)
        wait_for(one, 1)
        one.hand_in(one.work(), seed=2)
        wait_for(one, 2)
        between = two.work()
        assert between.version == 2
        one.hand_in(one.work(), seed=3)
        wait_for(one, 3)
        done = going_back(coordinator.data, 1)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("version 4 is what version 1 was; ")
        assert one.status().version == 4
        with pytest.raises(StaleUpdate, match="which the host took back"):
            two.hand_in(between)
        first, fourth = stored(coordinator.data, 1), stored(coordinator.data, 4)
        for name in first:
            np.testing.assert_array_equal(first[name].product(), fourth[name].product())
        work = one.work()  # and it goes on from there
        assert (work.version, work.start) == (
            4,
            rows(coordinator.data, "SELECT digest FROM versions")[0][0][:16],
        )
        one.hand_in(work, seed=4)
        wait_for(one, 5)
        coordinator.kill()
        coordinator.start()
        with pytest.raises(StaleUpdate, match="which the host took back"):
            two.hand_in(between)
        assert coordinator.stop() == 0
        assert "version 4 is what version 1 was, as the host wanted" in coordinator.log.read_text()
        assert "Traceback" not in coordinator.log.read_text()


def test_without_one_that_runs_it_is_done_at_once_also_to_the_very_beginning(tmp_path: Path) -> None:
    config = configuration(tmp_path, POLICY)
    with CoordinatorProcess(tmp_path, config) as coordinator, member(coordinator) as device:
        device.hand_in(device.work(), seed=1)
        wait_for(device, 1)
        assert coordinator.stop() == 0
        done = going_back(coordinator.data, 0)
        assert (done.returncode, done.stderr) == (0, "")
        coordinator.start()
        assert device.status().version == 2
        work = device.work()
        assert (work.version, work.carry_rank) == (2, 0)  # nothing is left that it would hold
        assert all(not f.product().any() for f in stored(coordinator.data, 2).values())
        device.hand_in(work, seed=2)
        wait_for(device, 3)
        shown = command("status", coordinator.data)
        assert "2 (as 0 was)" in shown.stdout


def test_what_cannot_be_gone_back_to_is_refused_in_one_line(tmp_path: Path) -> None:
    config = configuration(tmp_path, POLICY)
    with CoordinatorProcess(tmp_path, config) as coordinator, member(coordinator) as device:
        assert "no version has been published yet" in going_back(coordinator.data, 0).stderr
        for number in (1, 2):
            device.hand_in(device.work(), seed=number)
            wait_for(device, number)
        for to in (2, 3, -1):
            done = going_back(coordinator.data, to)
            assert done.returncode == 2
            assert f"--to {to}: the newest version is 2; name an older one" in done.stderr
            assert done.stderr.count("\n") == 1
        ((digest,),) = rows(coordinator.data, "SELECT digest FROM versions WHERE version = 1")
        path = coordinator.data / "blobs" / digest[:2] / digest
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert "the file of that version is damaged or gone" in going_back(coordinator.data, 1).stderr
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            assert device.status().version == 2
            time.sleep(0.5)


def test_the_collector_keeps_the_file_that_two_versions_share(tmp_path: Path) -> None:
    config = configuration(tmp_path, POLICY | {"max_staleness": 1, "lease_s": 1.0, "timeout_s": 1.0})
    config += "[storage]\nkeep_versions = 1\n"
    with CoordinatorProcess(tmp_path, config) as coordinator, member(coordinator) as device:
        for number in (1, 2):
            device.hand_in(device.work(), seed=number)
            wait_for(device, number)
        assert going_back(coordinator.data, 1).returncode == 0
        before = stored(coordinator.data, 3)
        coordinator.kill()
        coordinator.start()
        after = stored(coordinator.data, 3)
        for name in before:
            np.testing.assert_array_equal(before[name].product(), after[name].product())
