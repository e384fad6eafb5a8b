"""A full, read-only or failing disk: the request is told, the log says it once, and once mended all goes on.

Real processes. An error comes from a fail-point, from the system's own limit on the size of a file, or from a
file system of a megabyte, where this machine lets the test mount one.
"""

from __future__ import annotations

import contextlib
import functools
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.storage.failpoints import VARIABLE
from edge_sdk.connection.transport import Transport
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import DiskFull, InternalError, OurFault
from edge_sdk.core.messages import JoinRequest
from tests.coordinator.devices import (
    FINGERPRINT,
    SCALING,
    Device,
    configuration,
    member,
    random_adapter,
)
from tests.faults.conftest import Run
from tests.faults.outside import Seen, blob, rows
from tests.processes import PATIENCE_S, CoordinatorProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and mounts are Linux's")


def armed(folder: Path, policy: dict[str, object], fail: str) -> CoordinatorProcess:
    """A coordinator that meets this error, not started yet."""
    made = CoordinatorProcess(folder, configuration(folder, policy))
    made.environment[VARIABLE] = fail
    return made


def wait_for_version(coordinator: CoordinatorProcess, version: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while rows(coordinator.data, "SELECT COALESCE(MAX(version), 0) FROM versions") < [(version,)]:
        assert time.monotonic() < deadline, coordinator.log.read_text()[-2000:]
        time.sleep(0.05)


def errors_in(coordinator: CoordinatorProcess) -> list[str]:
    """Lines of the log that tell of the disk; a traceback tells nobody anything."""
    log = coordinator.log.read_text()
    assert "Traceback" not in log, log[-5000:]
    return [line for line in log.splitlines() if "no room to write" in line or "disk fails" in line]


@pytest.mark.parametrize(
    ("point", "file"),
    [
        ("upload-appended", r"uploads/\w+\.part"),
        ("blob-written", r"uploads/\w+\.part"),
        ("blob-renamed", r"uploads/\w+\.part"),
        ("update-written", "coordinator.sqlite"),
    ],
)
@pytest.mark.parametrize(
    ("error", "kind", "cause"),
    [
        ("ENOSPC", DiskFull, "has no room to write {} \\(No space left on device\\)"),
        ("EROFS", InternalError, "disk fails at {} \\(Read-only file system\\)"),
    ],
)
def test_an_update_waits_at_its_device_until_the_disk_is_mended(
    tmp_path: Path, point: str, file: str, error: str, kind: type[OurFault], cause: str
) -> None:
    with armed(tmp_path, {"buffer_size": 1}, f"{point}@1={error}") as coordinator:
        with member(coordinator) as device:
            work = device.work()
            with pytest.raises(kind, match=cause.format(file) + "; its host must .*; nothing is lost"):
                device.hand_in(work)
            device.hand_in(work)
        wait_for_version(coordinator, 1)
        assert len(errors_in(coordinator)) == 1
        assert coordinator.stop() == 0
        Seen().check(coordinator.data, [work.id])


@pytest.mark.parametrize("point", ["version-written", "blob-written@2-3", "collected-written"])
def test_a_merge_waits_until_there_is_room(tmp_path: Path, point: str) -> None:
    point = point if "@" in point else f"{point}@1-2"
    with armed(tmp_path, {"buffer_size": 1}, f"{point}=ENOSPC") as coordinator:
        with member(coordinator) as device:
            work = device.work()
            device.hand_in(work)  # it is acknowledged: what is left to do is the host's
            wait_for_version(coordinator, 1)
        assert coordinator.stop() == 0
        assert len(errors_in(coordinator)) in (1, 2)  # one for each try
        Seen().check(coordinator.data, [work.id])
        assert rows(coordinator.data, "SELECT merged_version FROM updates") == [(1,)]


def test_what_expires_meanwhile_is_noted_later(tmp_path: Path) -> None:
    policy = {"buffer_size": 3, "lease_s": 1.0, "timeout_s": 5.0}
    with armed(tmp_path, policy, "expiry-written@1-3=EROFS") as coordinator:
        with member(coordinator) as device:
            device.work()
            deadline = time.monotonic() + PATIENCE_S
            while rows(coordinator.data, "SELECT COUNT(*) FROM assignments WHERE open = 1") != [(0,)]:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            device.hand_in(device.work())
        assert len(errors_in(coordinator)) == 1


def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path: Path) -> None:
    """EFBIG from the system itself, in uploads and in SQLite's log."""
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path, {"buffer_size": 1})) as coordinator,
        member(coordinator) as device,
    ):
        work = device.work(8)
        content = codec.encode(random_adapter(8, 1), SCALING)
        limit = functools.partial(resource.prlimit, coordinator.pid, resource.RLIMIT_FSIZE)
        unlimited = limit()
        assert len(content) > 4096 > coordinator.log.stat().st_size
        limit((4096, unlimited[1]))
        with pytest.raises(DiskFull, match=r"uploads/\w+\.part \(File too large\)"):
            device.send(work, content)
        with pytest.raises(OurFault, match=r"coordinator\.sqlite \("), member(coordinator, "another"):
            pass
        limit(unlimited)
        device.hand_in(work, content)
        wait_for_version(coordinator, 1)
        assert len(errors_in(coordinator)) == 2
        assert coordinator.stop() == 0
        Seen().check(coordinator.data, [work.id])


@pytest.mark.parametrize("point", ["migration-written", "meta-written", "token-written"])
@pytest.mark.parametrize(("error", "cause"), [("ENOSPC", "No space left"), ("EROFS", "Read-only")])
def test_a_start_that_cannot_write_is_one_line(
    run: Run, tmp_path: Path, point: str, error: str, cause: str
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(configuration(tmp_path))
    arguments = ("serve", "--data", tmp_path / "data", "--config", config, "--port", 0)
    done = run(*arguments, fail=f"{point}={error}")
    assert done.returncode == 2
    assert "listening" not in done.stdout
    assert done.stderr.startswith("edge-coordinator: ")
    assert done.stderr.count("\n") == 1
    assert cause in done.stderr
    assert "coordinator.sqlite" in done.stderr or "-token" in done.stderr


def test_a_damaged_version_stops_merges_until_it_is_put_back(tmp_path: Path) -> None:
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path, {"buffer_size": 1})) as coordinator,
        member(coordinator) as device,
    ):
        device.hand_in(device.work())
        wait_for_version(coordinator, 1)
        ((digest,),) = rows(coordinator.data, "SELECT digest FROM versions")
        path = blob(coordinator.data, digest)
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 0x10]) + content[-2:])
        work = device.work()
        device.hand_in(work, seed=2)  # acknowledged all the same
        deadline = time.monotonic() + PATIENCE_S
        while "version 1 is not what was published" not in coordinator.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert device.status().version == 1
        path.write_bytes(content)
        wait_for_version(coordinator, 2)
        assert "Traceback" not in coordinator.log.read_text()
        assert coordinator.stop() == 0
        Seen().check(coordinator.data, [work.id])


# --- a file system of its own ---------------------------------------------------------------------


@functools.cache
def can_mount() -> bool:
    """Whether this machine gives a test a mount of its own, which ends with its process."""
    tools = all(map(shutil.which, ("unshare", "nsenter", "mount")))
    return (
        tools
        and not subprocess.run(
            ["unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /mnt"], capture_output=True, check=False
        ).returncode
    )


needs_mounts = pytest.mark.skipif(not can_mount(), reason="this machine does not let a test mount anything")


def on_a_disk(folder: Path, options: str) -> list[str]:
    """Put before a command line: a small file system, seen by that process alone, is mounted on `folder`."""
    folder.mkdir(exist_ok=True)
    return ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o {options} tmpfs {folder} && exec "$@"', "sh"]


@needs_mounts
def test_a_full_disk_fills_up_and_is_enlarged(tmp_path: Path) -> None:
    coordinator = CoordinatorProcess(
        tmp_path, configuration(tmp_path, {"buffer_size": 1000, "quorum": 1000, "timeout_s": 600.0})
    )
    coordinator.before = on_a_disk(coordinator.data, "size=1m")
    with coordinator:
        inside = Path(f"/proc/{coordinator.pid}/root{coordinator.data}")
        token = (inside / "join-token").read_text().strip()
        content = [codec.encode(random_adapter(8, seed), SCALING) for seed in range(400)]
        acknowledged, refused = [], None
        for number in range(400):
            try:
                with joined(coordinator, token, number) as device:
                    work = device.work(8)
                    device.hand_in(work, content[number])
            except OurFault as error:
                refused = error
                break
            acknowledged.append(work.id)
        assert refused is not None
        assert isinstance(refused, DiskFull), refused
        assert acknowledged
        enlarge = f"mount -o remount,size=20m {coordinator.data}"
        subprocess.run(["nsenter", "-t", str(coordinator.pid), "-m", "sh", "-c", enlarge], check=True)
        with joined(coordinator, token, 1000) as device:
            work = device.work(8)
            device.hand_in(work, content[-1])
            acknowledged.append(work.id)
        secret = (inside / "host-token").read_text().strip()
        with contextlib.closing(Transport(coordinator.url, secret)) as host:
            buffered = host.status().buffered
        assert len(errors_in(coordinator)) == 1
        copy = tmp_path / "copy"  # SQLite would follow the link to the folder outside
        shutil.copytree(inside, copy)
        Seen().check(copy, acknowledged)
        assert buffered == len(rows(copy, "SELECT 1 FROM updates"))


@contextlib.contextmanager
def joined(coordinator: CoordinatorProcess, token: str, number: int) -> Iterator[Device]:
    """A device of a coordinator whose folder this process does not see."""
    joining = Transport(coordinator.url, token)
    try:
        reply = joining.join(JoinRequest(f"device {number}", FINGERPRINT, {}))
    finally:
        joining.close()
    transport = Transport(coordinator.url, reply.credential)
    try:
        yield Device(transport, reply.device_id, reply.credential)
    finally:
        transport.close()


@needs_mounts
@pytest.mark.parametrize(("options", "cause"), [("size=16k", "full|No space"), ("ro", "Read-only")])
def test_a_start_on_a_disk_that_takes_nothing_is_one_line(tmp_path: Path, options: str, cause: str) -> None:
    config = tmp_path / "c.toml"
    config.write_text(configuration(tmp_path))
    data = tmp_path / "data"
    serve = [sys.executable, "-m", "coordinator.cli", "serve", "--data", str(data), "--config", str(config)]
    done = subprocess.run(
        [*on_a_disk(data, options), *serve],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"edge-coordinator: {data}")
    assert done.stderr.count("\n") == 1
    assert any(word in done.stderr for word in cause.split("|")), done.stderr
