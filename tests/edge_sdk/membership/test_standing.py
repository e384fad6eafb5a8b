"""A device that leaves, whose credential is renewed, or whose join had no answer: a real coordinator."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk.cli import main
from edge_sdk.connection.transport import Transport
from edge_sdk.core.errors import Unauthorised, Unreachable
from edge_sdk.core.messages import JoinRequest
from edge_sdk.membership.journal import ATTEMPT, SESSION, Journal
from edge_sdk.membership.membership import Membership
from edge_sdk.options import Options
from tests.processes import CoordinatorProcess, command


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[CoordinatorProcess]:
    with CoordinatorProcess(tmp_path, "[joining]\ncredential_days = 1e-9\n") as process:
        yield process


def member(coordinator: CoordinatorProcess, state: Path) -> Membership:
    options = Options(name="attic", state_dir=state, device="cpu")
    return Membership(coordinator.url, options, coordinator.join_token, lambda *_, **__: None)


def stored(state: Path) -> str:
    return str(json.loads((state / SESSION).read_text())["credential"])


def opens(coordinator: CoordinatorProcess, credential: str) -> bool:
    transport = Transport(coordinator.url, credential)
    try:
        transport.newest()
    except Unauthorised:
        return False
    finally:
        transport.close()
    return True


def test_a_credential_is_renewed_and_kept(coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    it = member(coordinator, tmp_path / "state")
    it.connect()
    first = it.session.credential
    it.renew()
    assert it.session.credential == stored(tmp_path / "state") != first
    assert it.transport.newest().version == 0  # by the new one
    it.close()
    again = member(coordinator, tmp_path / "state")
    again.connect()
    assert again.session == it.session
    again.close()


def test_what_cannot_be_renewed_goes_on_with_the_old_one(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    it = member(coordinator, tmp_path / "state")
    it.connect()
    before = it.session
    coordinator.stop()
    it.renew()
    assert (it.session, stored(tmp_path / "state")) == (before, before.credential)
    coordinator.start()
    assert opens(coordinator, before.credential)
    it.close()


def test_a_device_that_leaves_holds_nothing_of_the_federation(
    coordinator: CoordinatorProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    it = member(coordinator, state)
    it.connect()
    it.close()
    credential = stored(state)
    (state / "mine.txt").write_text("the owner's")
    assert main(["leave", "--state", str(state)]) == 0
    assert "what was handed in still counts" in capsys.readouterr().out
    assert sorted(path.name for path in state.iterdir()) == ["lock", "mine.txt"]
    assert not opens(coordinator, credential)
    listed = command("coordinator.cli", "devices", "--data", coordinator.data, "--json").stdout
    assert [one["standing"] for one in json.loads(listed)] == ["left"]
    assert main(["leave", "--state", str(state)]) == 2
    assert "is no member" in capsys.readouterr().err


def test_leaving_a_coordinator_that_is_gone(
    coordinator: CoordinatorProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The membership stays until the coordinator was told, or the owner says that it need not be."""
    state = tmp_path / "state"
    it = member(coordinator, state)
    it.connect()
    it.close()
    coordinator.stop()
    assert main(["leave", "--state", str(state)]) != 0
    assert (state / SESSION).exists()
    assert main(["leave", "--state", str(state), "--forget"]) == 0
    assert "was not told" in capsys.readouterr().out
    assert not (state / SESSION).exists()
    coordinator.start()


def test_an_attempt_to_join_is_the_same_until_it_is_answered(
    coordinator: CoordinatorProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    truly = Transport.join

    def lost(self: Transport, request: JoinRequest) -> None:
        sent.append(request)
        truly(self, request)
        raise Unreachable("the answer was lost")

    monkeypatch.setattr(Transport, "join", lost)
    for _ in range(2):
        it = member(coordinator, tmp_path / "state")
        with pytest.raises(Unreachable):
            it.connect()
        it.close()
    monkeypatch.undo()
    it = member(coordinator, tmp_path / "state")
    it.connect()
    assert len({request.attempt for request in sent}) == 1
    assert sent[0] == sent[1]
    assert not (tmp_path / "state" / ATTEMPT).exists()
    listed = json.loads(command("coordinator.cli", "devices", "--data", coordinator.data, "--json").stdout)
    assert [one["id"] for one in listed] == [it.session.device_id]
    it.close()


def test_a_damaged_attempt_is_made_anew(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    made = journal.attempt()
    assert journal.attempt() == made
    (tmp_path / ATTEMPT).write_text("x\n")
    assert journal.attempt() not in (made, "x")
    journal.end_attempt()
    journal.end_attempt()
    assert dataclasses.fields(JoinRequest)[-1].name == "attempt"
