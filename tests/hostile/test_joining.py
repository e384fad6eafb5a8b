"""Who may take part: invitations, standings, the host's own credential, and what is noted of all that."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from edge_sdk.core.invitation import parse
from tests.coordinator.devices import FINGERPRINT
from tests.faults.outside import rows
from tests.hostile.harness import GoodDevice, Target, attacked, bearer
from tests.processes import PATIENCE_S, command


def host(target: Target, *arguments: object) -> str:
    """What a command of the host says."""
    done = command("coordinator.cli", *arguments, "--data", target.coordinator.data)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def invite(target: Target, *arguments: object) -> str:
    """The token of an invitation."""
    return parse(json.loads(host(target, "invite", "--json", *arguments))["invitation"]).token


def join(target: Target, token: str, name: str = "attic", **more: str) -> httpx.Response:
    body = {"name": name, "fingerprint": FINGERPRINT, **more}
    return httpx.post(f"{target.coordinator.url}/v1/join", json=body, headers=bearer(token), trust_env=False)


def get(target: Target, route: str, secret: str) -> int:
    url = f"{target.coordinator.url}{route}"
    return httpx.get(url, headers=bearer(secret), trust_env=False).status_code


def soon(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def change(target: Target, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(target.coordinator.data / "coordinator.sqlite")) as database:
        database.execute(statement)
        database.commit()


def test_strings_that_let_nobody_in(tmp_path: Path) -> None:
    """Used up, expired, deleted, guessed, cut short: each is refused with why, and none is in the log."""
    with attacked(tmp_path) as target:
        used, two, expired, deleted = (invite(target, *of) for of in ((), ("--uses", 2), (), ()))
        assert join(target, used).status_code == 201
        for _ in range(2):
            assert join(target, two).status_code == 201
        change(target, "UPDATE invitations SET expires_at = 1 WHERE rowid = 3")
        ids = [one["id"] for one in json.loads(host(target, "invitations", "--json"))]
        host(target, "uninvite", ids[3])
        for token, why in (
            (used, "has been used"),
            (two, "has been used"),
            (expired, "has expired"),
            (deleted, "wrong join token"),
            ("0" * 32, "wrong join token"),
            (used[:-1], "wrong join token"),
        ):
            refused = join(target, token)
            assert refused.status_code == 401
            assert why in refused.json()["detail"]
        assert get(target, "/v1/federation", expired) == 401
        noted = host(target, "audit", "--last", 1000) + target.coordinator.log.read_text()
        assert "join refused" in noted or "wrong join token" in noted
        for secret in (used, two, expired, deleted):
            assert secret not in noted
    kept = b"".join(path.read_bytes() for path in target.coordinator.data.glob("coordinator.sqlite*"))
    for secret in (used, two, expired, deleted):
        assert secret.encode() not in kept


def test_every_secret_opens_its_own_door_alone(tmp_path: Path) -> None:
    with attacked(tmp_path) as target, contextlib.closing(target.device()) as device:
        process, invitation = target.coordinator, invite(target, "--uses", 0)
        opened = {
            (name, route): get(target, route, secret) < 400
            for name, secret in (
                ("invitation", invitation),
                ("join token", process.join_token),
                ("credential", device.credential),
                ("host token", process.host_token),
            )
            for route in ("/v1/federation", "/v1/newest", "/v1/status")
        }
        assert {place for place, is_open in opened.items() if is_open} == {
            ("invitation", "/v1/federation"),
            ("join token", "/v1/federation"),
            ("credential", "/v1/federation"),
            ("credential", "/v1/newest"),
            ("host token", "/v1/status"),
        }
        for secret in (device.credential, process.host_token):
            assert join(target, secret).status_code == 401
        soon(lambda: "wrong host token" in host(target, "audit"))
        assert "host's route read" in host(target, "audit")


@pytest.mark.parametrize("by", ["an invitation", "the join token"])
def test_a_device_that_is_revoked(tmp_path: Path, by: str) -> None:
    """At once: its work counts no more, its credential opens nothing, and its string lets it in no more."""
    with attacked(tmp_path, {"buffer_size": 3, "quorum": 2, "timeout_s": 2.0}) as target:
        string = invite(target, "--uses", 5) if by == "an invitation" else target.coordinator.join_token
        bad = GoodDevice(target.coordinator.url, string, "bad")
        update = bad.hand_in()
        assert "out for good" in host(target, "revoke", "bad")
        ((rejected, merged),) = rows(
            target.coordinator.data,
            f"SELECT rejected, merged_version FROM updates WHERE assignment = '{update}'",
        )
        assert merged is None
        assert "revoked" in rejected
        soon(lambda: get(target, "/v1/newest", bad.credential) == 401)
        soon(lambda: join(target, string).status_code == 401)
        with contextlib.closing(target.device("other")) as other:
            target.acknowledged.append(other.hand_in(5))
            soon(lambda: other.http.get("/v1/newest").json()["version"] >= 1)
        merged_ids = rows(target.coordinator.data, "SELECT assignment FROM updates WHERE merged_version > 0")
        assert (update,) not in merged_ids
        soon(lambda: "revoked" in host(target, "audit"))
        url, token = f"{target.coordinator.url}/v1/status", target.coordinator.host_token
        listed = httpx.get(url, headers=bearer(token), trust_env=False).json()["devices"]
        assert [one["name"] for one in listed] == ["good 1", "other"]
        target.coordinator.stop()
        target.coordinator.start()
        assert get(target, "/v1/newest", bad.credential) == 401
        bad.close()


def test_a_device_that_is_suspended(tmp_path: Path) -> None:
    policy: dict[str, object] = {"buffer_size": 9, "quorum": 9}
    with attacked(tmp_path, policy) as target, contextlib.closing(target.device("odd")) as odd:
        assignment = odd.work()
        host(target, "suspend", "odd")
        soon(lambda: odd.ask().status_code == 503)
        assert "suspended" in odd.ask().json()["reason"]
        beat = odd.http.post(f"/v1/assignments/{assignment}/heartbeat", json={"steps_done": 1})
        assert beat.json() == {"directive": "abandon"}
        assert odd.patch(assignment, b"abc").status_code == 409
        host(target, "resume", "odd")
        soon(lambda: odd.ask().status_code == 200)
        target.acknowledged.append(odd.hand_in(3))


def test_devices_that_the_host_has_not_approved(tmp_path: Path) -> None:
    """Nothing is to be had of the model before; and all of it afterwards."""
    with attacked(tmp_path) as target:
        config = target.coordinator.config
        config.write_text(config.read_text() + "[joining]\napprove = true\n")
        target.coordinator.stop()
        target.coordinator.start()
        with contextlib.closing(target.device("new")) as new:
            assert "not approved" in new.ask().json()["reason"]
            for route in ("/v1/newest", "/v1/versions/0/ranks/4/adapter_model.safetensors"):
                answer = new.http.get(route)
                assert answer.status_code == 404
                assert "not approved" in answer.json()["detail"]
            listed = host(target, "devices")
            assert "waiting" in listed
            assert max(map(len, listed.splitlines())) <= 80
            host(target, "approve", "new")
            soon(lambda: new.ask().status_code == 200)
            target.acknowledged.append(new.hand_in(3))
        config.write_text(config.read_text().replace("approve = true", "approve = false"))
        target.coordinator.stop()
        target.coordinator.start()


def test_a_credential_that_grows_old_is_renewed(tmp_path: Path) -> None:
    """The one before is good until the new one is used, and never after."""
    with attacked(tmp_path) as target, contextlib.closing(target.device()) as device:
        config = target.coordinator.config
        config.write_text(config.read_text() + "[joining]\ncredential_days = 0.00001\n")
        target.coordinator.stop()
        target.coordinator.start()
        soon(lambda: bool(device.ask().json()["renew"]))
        lost, renewed = (device.http.post("/v1/credential").json()["credential"] for _ in range(2))
        assert get(target, "/v1/newest", lost) == 401
        assert get(target, "/v1/newest", device.credential) == 200
        assert get(target, "/v1/newest", renewed) == 200
        soon(lambda: get(target, "/v1/newest", device.credential) == 401)
        target.coordinator.stop()
        target.coordinator.start()
        assert get(target, "/v1/newest", device.credential) == 401
        assert get(target, "/v1/newest", renewed) == 200


def test_a_flood_of_wrong_tokens_is_a_line_a_minute(tmp_path: Path) -> None:
    with attacked(tmp_path) as target:
        for number in range(300):
            assert join(target, f"{number:032}").status_code == 401
        target.coordinator.stop()
        entries = [json.loads(line) for line in host(target, "audit", "--json").splitlines()]
        wrong = [entry for entry in entries if entry["what"] == "wrong join token"]
        assert [entry["times"] for entry in wrong] == [1, 299]
        assert {entry["address"] for entry in wrong} == {"127.0.0.1"}
        target.coordinator.start()
