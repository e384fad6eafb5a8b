"""SIGKILL at every point between two steps on the disk, and at any time: from the outside, nothing is lost.

The coordinator is a real process on real sockets; its devices are threads that live through it all. Points
that come up under load are taken one after the other on one folder, with the devices at work all the while.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coordinator.storage.failpoints import POINTS, VARIABLE, Point
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import Unreachable
from edge_sdk.core.messages import Ask
from tests.coordinator.devices import SCALING, Device, configuration, member, random_adapter, update_of
from tests.faults.conftest import Run
from tests.faults.crowd import Crowd
from tests.faults.outside import Seen, blob, rows, temporaries
from tests.faults.test_member_kills import INVITING, RENEWING, SEEING, STANDING
from tests.processes import PATIENCE_S, ROOT, CoordinatorProcess, command, environment

FIRST_START: tuple[Point, ...] = (
    "migration-written",
    "migration-committed",
    "meta-written",
    "meta-committed",
    "token-written",
    "token-renamed",
)
UNDER_LOAD: tuple[Point, ...] = (
    "upload-appended",
    "upload-dropped",
    "blob-written",
    "blob-fsynced",
    "blob-folder-made",
    "blob-renamed",
    "blob-folder-fsynced",
    "cache-written",
    "cache-renamed",
    "device-written",
    "device-committed",
    "assignment-written",
    "assignment-committed",
    "expiry-written",
    "expiry-committed",
    "refusal-written",
    "refusal-committed",
    "update-written",
    "update-committed",
    "version-written",
    "version-committed",
    "collected-written",
    "collected-committed",
    "blob-collected",
    "cache-collected",
    "upload-collected",
)
NOTING: tuple[Point, ...] = ("audit-written", "audit-committed")  # once in a while
TIDYING: tuple[Point, ...] = ("temporary-collected",)
AT_EACH_START: tuple[Point, ...] = (
    "run-written",
    "run-committed",
    "folder-file-written",
    "folder-file-renamed",
)
FROM_ELSEWHERE: tuple[Point, ...] = ("elsewhere-written", "elsewhere-committed")
REJECTING: tuple[Point, ...] = ("rejection-written", "rejection-committed")
CLIPPING: tuple[Point, ...] = ("clip-written", "clip-committed")
MIGRATING: tuple[Point, ...] = ("migration-copied", "migration-copy-renamed")  # test_migration.py
MAKING_A_KEY: tuple[Point, ...] = (  # tests/coordinator/web/test_tls.py
    "tls-key-written",
    "tls-key-renamed",
    "tls-certificate-written",
    "tls-certificate-renamed",
)
OF_MEMBERS = STANDING + INVITING + RENEWING + SEEING  # test_member_kills.py
BACKING_UP: tuple[Point, ...] = ("backup-rows", "backup-blob", "backup-ready")  # test_backup.py

BUSY = {"buffer_size": 3, "timeout_s": 1.0, "retry_s": 0.05, "lease_s": 1.5, "max_staleness": 2}


def test_every_point_is_reached_by_a_test() -> None:
    named = FIRST_START + UNDER_LOAD + NOTING + TIDYING + AT_EACH_START + FROM_ELSEWHERE
    named += REJECTING + CLIPPING + MIGRATING + BACKING_UP + MAKING_A_KEY + OF_MEMBERS
    assert len(POINTS) == len(set(POINTS))
    assert sorted(named) == sorted(POINTS)


def test_the_table_of_the_documents_names_every_point() -> None:
    text = (ROOT / "docs" / "DURABILITY.md").read_text(encoding="utf-8")
    table = text[text.index("| the last point before the kill") :]
    rows_of_points = [line.split("|")[1] for line in table[: table.index("\n\n")].splitlines()[2:]]
    assert sorted(re.findall(r"`([a-z-]+)`", " ".join(rows_of_points))) == sorted(POINTS)


@dataclass
class Federation:
    """A coordinator that is killed again and again, its devices, and what was seen of its folder."""

    coordinator: CoordinatorProcess
    crowd: Crowd
    seen: Seen = field(default_factory=Seen)
    kills: int = 0

    def kill_at(self, point: Point, count: int = 1) -> None:
        """Start it; it ends itself when it comes to `point` for that time. Then look at what is left."""
        self.coordinator.environment[VARIABLE] = f"{point}@{count}=kill"
        try:
            self.coordinator.start()
            self.coordinator.wait()
        except AssertionError:
            assert not self.coordinator.is_running()  # it may come there before it listens
        said = self.coordinator.log.read_text().splitlines()
        # At the end of a line: another thread may have come to the point when half of one was said.
        last = f"reached {point}, time {count}: killed"
        assert any(line.endswith(last) for line in said[-3:]), said[-10:]
        self._look()

    def kill_after(self, delay_s: float) -> None:
        """Start it, and kill it at an odd time."""
        self.coordinator.environment.pop(VARIABLE, None)
        self.coordinator.start()
        time.sleep(delay_s)
        self.coordinator.kill()
        self._look()

    def _look(self) -> None:
        self.kills += 1
        self.seen.check(self.coordinator.data, self.crowd.acknowledged)

    def end_well(self) -> None:
        """Start it for the last time: the devices go on, what is due is merged, and nothing is left over."""
        before = len(self.crowd.acknowledged)
        self.coordinator.environment.pop(VARIABLE, None)
        self.coordinator.start()
        deadline = time.monotonic() + PATIENCE_S
        for device in self.crowd.devices:
            already = len(device.acknowledged)
            while not device.spoilt and len(device.acknowledged) < already + 2:  # every one, without help
                assert time.monotonic() < deadline, self.coordinator.log.read_text()[-3000:]
                time.sleep(0.02)
        self.crowd.stop()
        waiting = "SELECT COUNT(*) FROM updates WHERE merged_version IS NULL AND rejected IS NULL"
        while rows(self.coordinator.data, waiting) != [(0,)]:  # by the time-out, if by nothing else
            assert time.monotonic() < deadline, self.coordinator.log.read_text()[-3000:]
            time.sleep(0.05)
        assert self.coordinator.stop() == 0
        self.seen.check(self.coordinator.data, self.crowd.acknowledged)
        assert len(set(self.crowd.acknowledged)) == len(self.crowd.acknowledged) > before
        assert set(self.crowd.acknowledged) <= set(self.seen.merged)
        assert temporaries(self.coordinator.data) == []
        log = self.coordinator.log.read_text()
        assert "Traceback" not in log, log[-5000:]


def busy(folder: Path, rule: str) -> str:
    return configuration(folder, dict(BUSY), rule=rule) + "[storage]\nkeep_versions = 2\n"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Under a rule that needs what updates started from, and with as few versions kept as may be."""
    folder = tmp_path_factory.mktemp("federation")
    with CoordinatorProcess(folder, busy(folder, "innovation")) as coordinator:
        coordinator.kill()
        with Crowd(coordinator, 5) as crowd:
            made = Federation(coordinator, crowd)
            yield made
            made.end_well()


@pytest.mark.parametrize("point", UNDER_LOAD + NOTING)
def test_killed_under_load(federation: Federation, point: Point) -> None:
    federation.kill_at(point)


@pytest.mark.parametrize("point", AT_EACH_START)
def test_killed_while_it_counts_a_start(federation: Federation, point: Point) -> None:
    federation.kill_at(point)


@pytest.mark.parametrize("point", ["folder-file-written", "folder-file-renamed"])
def test_killed_while_it_notes_a_version(federation: Federation, point: Point) -> None:
    """The first time is that of the start. The database may be ahead of the file: the next start goes on."""
    federation.kill_at(point, 2)
    said = json.loads((federation.coordinator.data / "folder.json").read_text())["version"]
    ((newest,),) = rows(federation.coordinator.data, "SELECT MAX(version) FROM versions")
    assert newest - said == (1 if point == "folder-file-written" else 0)


@pytest.mark.parametrize("point", TIDYING)
def test_killed_while_it_tidies_up(federation: Federation, point: Point) -> None:
    strays = [
        federation.coordinator.data / "uploads" / ".write-1-0a",
        federation.coordinator.data / "cache" / ".f-1-2.safetensors-0a",
    ]
    for stray in strays:
        stray.write_bytes(b"half a f")
    before = len(temporaries(federation.coordinator.data))
    federation.kill_at(point)
    assert len(temporaries(federation.coordinator.data)) == before - 1


def test_killed_at_any_time(federation: Federation) -> None:
    chance = random.Random(1)
    for _ in range(3):
        federation.kill_after(chance.uniform(0.0, 0.6))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["innovation", "carry"])
def test_two_hundred_kills(tmp_path: Path, rule: str) -> None:
    """Every point at its first, second and fourth time, and 60 times at random: 138 kills under each rule."""
    chance = random.Random(2)
    with CoordinatorProcess(tmp_path, busy(tmp_path, rule)) as coordinator:
        coordinator.kill()
        with Crowd(coordinator, 6, carries=rule == "carry") as crowd:
            federation = Federation(coordinator, crowd)
            for point in UNDER_LOAD:
                for count in (1, 2, 4):
                    federation.kill_at(point, count)
            for _ in range(60):
                federation.kill_after(chance.uniform(0.0, 1.0))
            federation.end_well()
            print(f"{federation.kills} kills, {len(crowd.acknowledged)} updates acknowledged")
            assert federation.kills == 138


def test_killed_at_its_first_start(tmp_path: Path) -> None:
    coordinator = CoordinatorProcess(tmp_path, configuration(tmp_path, {"buffer_size": 1}))
    arguments = ("serve", "--data", coordinator.data, "--config", coordinator.config)
    for point in FIRST_START + AT_EACH_START:
        done = command("coordinator.cli", *arguments, environ={VARIABLE: f"{point}=kill"})
        assert (done.returncode, done.stderr) == (-9, f"reached {point}, time 1: killed\n")
    with coordinator:
        assert (coordinator.data / "join-token").stat().st_mode & 0o777 == 0o600
        assert len(coordinator.join_token) == 32
        with member(coordinator) as device:
            device.hand_in(device.work())
        assert coordinator.stop() == 0
        Seen().check(coordinator.data, [])


@pytest.mark.parametrize("point", REJECTING)
def test_killed_while_it_leaves_out_a_damaged_update(tmp_path: Path, point: Point) -> None:
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path, {"buffer_size": 2})) as coordinator,
        member(coordinator, "one") as one,
        member(coordinator, "two") as two,
    ):
        content = codec.encode(random_adapter(4, 1), SCALING)
        damaged = one.work()
        one.hand_in(damaged, content)
        coordinator.kill()
        path = blob(coordinator.data, update_of(content, 4).digest)
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 0x10]) + content[-2:])
        coordinator.environment[VARIABLE] = f"{point}=kill"
        coordinator.start()
        good = two.work()
        two.hand_in(good, seed=2)
        assert coordinator.wait() == -9
        rejected = rows(coordinator.data, "SELECT assignment FROM updates WHERE rejected IS NOT NULL")
        assert rejected == ([(damaged.id,)] if point == "rejection-committed" else [])
        coordinator.environment.clear()
        coordinator.start()
        third = once_there_is_work(coordinator, one)
        assert coordinator.stop() == 0
        seen = Seen()
        seen.check(coordinator.data, [damaged.id, good.id, third])
        assert seen.merged == {good.id: 1, third: 1}
        ((reason,),) = rows(coordinator.data, "SELECT rejected FROM updates WHERE rejected IS NOT NULL")
        assert "not what was acknowledged" in reason


@pytest.mark.parametrize("point", FROM_ELSEWHERE)
def test_killed_while_it_notes_a_device_from_elsewhere(tmp_path: Path, point: Point) -> None:
    made = CoordinatorProcess(tmp_path, configuration(tmp_path, {"buffer_size": 1}))
    made.environment[VARIABLE] = f"{point}=kill"
    with made as coordinator, member(coordinator) as device:
        with pytest.raises(Unreachable):
            device.transport.ask(Ask(4, 0, "1-01234567"))
        assert coordinator.wait() == -9
        noted = rows(coordinator.data, "SELECT device, run, heard_in FROM elsewhere")
        assert noted == ([(device.id, "1-01234567", 1)] if point == "elsewhere-committed" else [])
        coordinator.environment.clear()
        coordinator.start()
        device.hand_in(device.work())
        assert coordinator.stop() == 0


@pytest.mark.parametrize("point", CLIPPING)
def test_killed_while_it_clips_what_came_before_there_was_a_bound(tmp_path: Path, point: Point) -> None:
    config = configuration(tmp_path, {"buffer_size": 3}, history_least=3, norm_factor=2.0)
    made = CoordinatorProcess(tmp_path, config)
    made.environment[VARIABLE] = f"{point}=kill"
    with (
        made as coordinator,
        member(coordinator, "one") as one,
        member(coordinator, "two") as two,
        member(coordinator, "loud") as loud,
    ):
        big = loud.work()
        loud.hand_in(big, codec.encode(random_adapter(4, 3, scale=5.0), SCALING))
        for device in (one, two):
            device.hand_in(device.work(), seed=1)
        assert coordinator.wait() == -9
        coordinator.environment.clear()
        coordinator.start()
        deadline = time.monotonic() + PATIENCE_S
        while not rows(coordinator.data, "SELECT version FROM versions"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert coordinator.stop() == 0
        Seen().check(coordinator.data, [big.id])
        clipped = rows(coordinator.data, "SELECT assignment FROM updates WHERE factor < 1.0")
        assert clipped == [(big.id,)]


def once_there_is_work(coordinator: CoordinatorProcess, device: Device) -> str:
    """Hand in one more update as soon as its device gets work again."""
    deadline = time.monotonic() + PATIENCE_S
    while device.waits():
        assert time.monotonic() < deadline, coordinator.log.read_text()[-2000:]
        time.sleep(0.05)
    work = device.work()
    device.hand_in(work, seed=7)
    return work.id


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("blob-renmaed=kill", "no point is called 'blob-renmaed'; there are upload-appended, "),
        ("blob-renamed", "'blob-renamed' is not written like blob-renamed=kill"),
        ("blob-renamed=EOOPS", "'EOOPS' is neither `kill` nor the name of an error"),
        ("blob-renamed@x=kill", "is not written like"),
    ],
)
def test_a_fail_point_that_is_none_is_refused_at_the_start(
    run: Run, tmp_path: Path, text: str, reason: str
) -> None:
    done = run("serve", "--data", tmp_path / "data", fail=text)
    assert not (tmp_path / "data").exists()
    assert done.returncode == 2
    assert done.stderr.startswith(f"edge-coordinator: {VARIABLE}: ")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_tests_arm_nothing_by_themselves() -> None:
    assert VARIABLE not in environment()
