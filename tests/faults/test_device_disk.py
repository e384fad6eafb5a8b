"""A disk that is full, and a state folder that two want: nothing is lost, and one line says what is wrong."""

from __future__ import annotations

import io
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from edge_sdk.core.errors import Unwritable
from edge_sdk.core.messages import Base
from edge_sdk.membership.journal import Journal
from edge_sdk.model import base_model
from edge_sdk.system import durable
from edge_sdk.training.plan import Interrupted, StepAnswer, StepReport
from edge_sdk.worker.process import WorkerProcess
from tests.device_agents import device, federation_config, quick, text_of, updates, wait_until
from tests.edge_sdk.worker.test_worker import job_in, prepared, setup_of
from tests.models import build_model
from tests.processes import PATIENCE_S, CoordinatorProcess

__all__ = ["quick"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of POSIX, and forks")

STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return base_model.describe(str(build_model(tmp_path_factory.mktemp("base"), "llama")))


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Iterator[CoordinatorProcess]:
    folder = tmp_path_factory.mktemp("coordinator")
    with CoordinatorProcess(folder, federation_config(folder, base, STEPS, checkpoint_s=0.001)) as process:
        yield process


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_of(tmp_path_factory.mktemp("data"))


def no_limit(pid: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_worker_whose_disk_is_full_trains_on_and_waits_with_the_result(tmp_path: Path) -> None:
    """No file above 4 KB can be written: neither the checkpoint nor the adapter, until there is room."""
    reports: list[StepReport] = []
    done: list[Any] = []
    with WorkerProcess(setup_of(build_model(tmp_path / "base", "llama"))) as worker:
        pid = prepared(worker)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        job = job_in(tmp_path, STEPS)

        def note(report: StepReport) -> StepAnswer:
            reports.append(report)
            return "continue"

        thread = threading.Thread(target=lambda: done.append(worker.train(job, note)))
        thread.start()
        wait_until(
            lambda: (
                reports and reports[-1].step == STEPS and "outbox cannot be written" in reports[-1].trouble
            )
        )
        assert not Path(job.outbox).exists()
        assert not Path(job.checkpoint).exists()
        no_limit(pid)
        thread.join(PATIENCE_S)
        assert done[0].size_bytes == Path(job.outbox).stat().st_size
        steps = [report.step for report in reports]
        assert steps == sorted(steps)  # nothing was trained twice
        assert any("checkpoint cannot be written (File too large)" in report.trouble for report in reports)
        assert not list(tmp_path.glob(".*.tmp"))

        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        leave = job_in(tmp_path, STEPS)
        with pytest.raises(Interrupted):  # a stop is heard while it waits
            worker.train(leave, lambda report: "interrupt" if "outbox" in report.trouble else "continue")


class HalfWritten(io.FileIO):
    """A file on a disk that is full after half of what is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")

    def write(self, content: Any) -> int:
        super().write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_disk_that_is_full_at_any_write(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Three writes in a row fail, from the nth on, whatever is written then; the work arrives once."""
    create, count = durable.create, 0

    def full(path: Path, mode: int) -> BinaryIO:
        nonlocal count
        file = create(path, mode)
        if path.parent.name == "device" and path.name != ".link.json.tmp":
            count += 1
            if at <= count < at + 3:
                file.close()
                return HalfWritten(path)
        return file

    it = device(coordinator.url, coordinator.join_token, tmp_path / "device", data)
    it.agent.prepare()  # joining needs the disk; a person is there to see
    monkeypatch.setattr(durable, "create", full)
    assert it.agent.run(updates=1) == 1
    it.agent.close()
    assert count >= at + 3
    (update,) = updates(coordinator, it.id)
    assert (update["steps"], update["examples"]) == (STEPS, 2 * STEPS)
    assert not list(it.agent.journal.folder.glob(".*.tmp"))
    told = it.texts("disk")
    assert 1 <= len(told) <= 4
    assert "No space left on device" in told[0]


# --- one agent on one state folder ------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_agents_take_turns_on_a_state_folder(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    """The first, which still remembers an older session, believes the disk."""
    one, two = (device(coordinator.url, coordinator.join_token, tmp_path / "device", data) for _ in range(2))
    assert [it.agent.run(updates=1) for it in (one, two, one)] == [1, 1, 1]
    assert one.agent.journal.load().delivered == 3  # type: ignore[union-attr]
    assert len(updates(coordinator, one.id)) == 3
    for it in (one, two):
        it.agent.close()


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for name in (".session.json.tmp", ".checkpoint.safetensors.tmp", "checkpoint.safetensors.new"):
        (tmp_path / name).write_bytes(b"half")
    with journal.held():
        assert {path.name for path in tmp_path.iterdir()} <= {"adapters", "lock"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unwritable, match=r"session.json cannot be written"):
        durable.write_durably(tmp_path / "file" / "session.json", b"x")
