"""SIGKILL between any two steps of what is written down of members: who is out stays out, who is in is in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from coordinator.storage.failpoints import VARIABLE, Point
from edge_sdk.connection.transport import Transport
from edge_sdk.core.errors import Unauthorised, Unreachable
from edge_sdk.core.messages import JoinRequest
from tests.coordinator.devices import FINGERPRINT, Device, configuration, member
from tests.faults.outside import rows
from tests.processes import CoordinatorProcess, command

STANDING: tuple[Point, ...] = ("standing-written", "standing-committed")
INVITING: tuple[Point, ...] = ("invitation-written", "invitation-committed")
RENEWING: tuple[Point, ...] = ("credential-written", "credential-committed")
SEEING: tuple[Point, ...] = ("seen-written", "seen-committed")


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[CoordinatorProcess]:
    with CoordinatorProcess(tmp_path, configuration(tmp_path)) as process:
        yield process


def killed_at(coordinator: CoordinatorProcess, point: Point, *arguments: object) -> None:
    """Run a command on the folder; it ends itself when it comes to that point."""
    done = command(
        "coordinator.cli", *arguments, "--data", coordinator.data, environ={VARIABLE: f"{point}=kill"}
    )
    assert done.returncode == -9, done.stdout + done.stderr


def is_in(device: Device) -> bool:
    try:
        device.transport.federation()
    except Unauthorised:
        return False
    return True


@pytest.mark.parametrize("point", STANDING)
def test_killed_while_a_device_is_revoked(coordinator: CoordinatorProcess, point: Point) -> None:
    """Nothing of it or all of it, over a start as well: its update is left out with it, or neither is."""
    with member(coordinator, "red") as red, member(coordinator, "blue") as blue:
        red.hand_in(red.work())
        killed_at(coordinator, point, "revoke", "red")
        coordinator.kill()
        coordinator.start()
        done = point == "standing-committed"
        assert (is_in(red), is_in(blue)) == (not done, True)
        ((rejected,),) = rows(coordinator.data, "SELECT rejected FROM updates")
        assert (rejected is not None) == done


@pytest.mark.parametrize("point", STANDING)
def test_killed_while_a_device_leaves(coordinator: CoordinatorProcess, point: Point) -> None:
    with member(coordinator) as device:
        restart_with(coordinator, f"{point}=kill")
        with pytest.raises(Unreachable):
            device.transport.leave()
        coordinator.wait()
        restart_with(coordinator, "")
        if point == "standing-written":
            device.transport.leave()
        assert not is_in(device)


def restart_with(coordinator: CoordinatorProcess, armed: str) -> None:
    if coordinator.is_running():
        coordinator.stop()
    coordinator.environment[VARIABLE] = armed
    coordinator.start()


@pytest.mark.parametrize("point", INVITING)
def test_killed_while_somebody_is_invited(coordinator: CoordinatorProcess, point: Point) -> None:
    killed_at(coordinator, point, "invite")
    listed = json.loads(
        command("coordinator.cli", "invitations", "--data", coordinator.data, "--json").stdout
    )
    assert len(listed) == (point == "invitation-committed")


@pytest.mark.parametrize("point", RENEWING)
def test_killed_while_a_credential_is_renewed(coordinator: CoordinatorProcess, point: Point) -> None:
    """The answer was lost either way: the old one goes on, and another is to be had."""
    with member(coordinator) as device:
        restart_with(coordinator, f"{point}=kill")
        with pytest.raises(Unreachable):
            device.transport.renew()
        coordinator.wait()
        restart_with(coordinator, "")
        assert is_in(device)
        renewed = device.transport.renew().credential
        other = Device(Transport(coordinator.url, renewed), device.id, renewed)
        assert is_in(other)
        other.transport.close()


@pytest.mark.parametrize("point", RENEWING)
def test_killed_when_a_new_credential_is_used_first(coordinator: CoordinatorProcess, point: Point) -> None:
    with member(coordinator) as device:
        renewed = device.transport.renew().credential
        other = Device(Transport(coordinator.url, renewed), device.id, renewed)
        restart_with(coordinator, f"{point}=kill")
        assert is_in(other)
        coordinator.wait()  # at the next tick
        restart_with(coordinator, "")
        assert is_in(other)
        other.transport.close()


@pytest.mark.parametrize("point", SEEING)
def test_killed_while_it_notes_who_was_seen(coordinator: CoordinatorProcess, point: Point) -> None:
    restart_with(coordinator, f"{point}=kill")
    with member(coordinator) as device:
        device.work()
        assert coordinator.stop() != 0
        restart_with(coordinator, "")
        assert is_in(device)


def test_a_join_whose_answer_was_lost_is_the_same_device(coordinator: CoordinatorProcess) -> None:
    """By an invitation for one; a second device does not come in by it."""
    said = command("coordinator.cli", "invite", "--data", coordinator.data, "--json")
    token = json.loads(said.stdout)["invitation"].partition("#")[2]
    restart_with(coordinator, "device-committed=kill")
    joining = Transport(coordinator.url, token)
    asked = JoinRequest("attic", FINGERPRINT, attempt="a" * 32)
    with pytest.raises(Unreachable):
        joining.join(asked)
    coordinator.wait()
    restart_with(coordinator, "")
    reply = joining.join(asked)
    assert rows(coordinator.data, "SELECT id FROM devices") == [(reply.device_id,)]
    assert rows(coordinator.data, "SELECT used FROM invitations") == [(1,)]
    with pytest.raises(Unauthorised, match="has been used"):
        joining.join(JoinRequest("attic", FINGERPRINT, attempt="b" * 32))
    joining.close()
    assert httpx.get(f"{coordinator.url}/v1/newest", headers={"Authorization": f"Bearer {reply.credential}"})
