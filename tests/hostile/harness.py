"""A coordinator that is attacked, and whether it was harmed: by what anybody can see from outside of it.

    with attacked(tmp_path) as target:
        … an attack on target.coordinator …

At the end of the block a good device is served, memory and descriptors are back, the log has no traceback,
and the data folder holds all that was acknowledged. No limit here measures speed: each is many times what is
usual.
"""

from __future__ import annotations

import contextlib
import gc
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from edge_sdk.core.adapter_file.codec import encode
from edge_sdk.core.messages import OFFSET_CONTENT_TYPE, UPLOAD_OFFSET
from edge_sdk.core.records import to_json
from tests.coordinator.devices import FINGERPRINT, SCALING, configuration, random_adapter, update_of
from tests.faults.outside import Seen
from tests.processes import PATIENCE_S, CoordinatorProcess

MORE_MEMORY_BYTES = 96 << 20  # above what it held before: heaps keep pieces, caches fill
MORE_DESCRIPTORS = 16  # connections that end by themselves, and worker threads of SQLite
SETTLING_S = 30.0


class GoodDevice:
    """A member by plain HTTP, without any code of the device's: joins, asks, and hands in a small adapter."""

    def __init__(self, url: str, join_token: str, name: str = "good", ca: Path | None = None) -> None:
        verify = ssl.create_default_context(cafile=ca) if ca else True
        self.http = httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False, verify=verify)
        body = {"name": name, "fingerprint": FINGERPRINT, "protocol": 1}
        deadline = time.monotonic() + PATIENCE_S
        joined = self.http.post("/v1/join", json=body, headers=bearer(join_token))
        while joined.status_code == 429 and time.monotonic() < deadline:  # others flood
            time.sleep(joined.json()["retry_after_s"])
            joined = self.http.post("/v1/join", json=body, headers=bearer(join_token))
        assert joined.status_code == 201, joined.text
        self.credential: str = joined.json()["credential"]
        self.http.headers.update(bearer(self.credential))

    def ask(self, rank: int = 4) -> httpx.Response:
        return self.http.post("/v1/assignments", json={"rank": rank, "carry_rank": rank})

    def work(self, rank: int = 4) -> str:
        """The id of an assignment, waited for."""
        deadline = time.monotonic() + PATIENCE_S
        while (answer := self.ask(rank)).status_code != 200:
            assert answer.status_code == 503, answer.text
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.05)
        return str(answer.json()["id"])

    def patch(self, assignment: str, content: bytes, offset: object = 0) -> httpx.Response:
        headers = {UPLOAD_OFFSET: str(offset), "Content-Type": OFFSET_CONTENT_TYPE}
        return self.http.patch(f"/v1/assignments/{assignment}/adapter", content=content, headers=headers)

    def hand_in(self, seed: int = 0) -> str:
        """One legal update from start to end; the assignment that was acknowledged."""
        assignment, content = self.work(), encode(random_adapter(4, seed, 0.01), SCALING)
        uploaded = self.patch(assignment, content)
        assert uploaded.status_code == 204, uploaded.text
        record = to_json(update_of(content, 4))
        delivered = self.http.post(f"/v1/assignments/{assignment}/update", json=record)
        assert delivered.status_code == 202, delivered.text
        return assignment

    def close(self) -> None:
        self.http.close()


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def raw(coordinator: CoordinatorProcess, sent: bytes, timeout_s: float = PATIENCE_S) -> bytes:
    """Bytes to a connection of their own, and all that comes back before it ends or is silent."""
    with (
        socket.create_connection(("127.0.0.1", coordinator.port), timeout_s) as connection,
        contextlib.suppress(ConnectionError, TimeoutError),
    ):
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))
    return b""


@dataclass
class Target:
    """A coordinator under attack, with what was acknowledged to good devices so far."""

    coordinator: CoordinatorProcess
    acknowledged: list[str] = field(default_factory=list)

    def device(self, name: str = "good") -> GoodDevice:
        own = self.coordinator.data / "tls-cert.pem"
        ca = own if self.coordinator.scheme == "https" else None
        return GoodDevice(self.coordinator.url, self.coordinator.join_token, name, ca)

    def serve(self, seed: int) -> float:
        """Seconds that a new good device needs from joining to its acknowledgement."""
        begun = time.monotonic()
        with contextlib.closing(self.device(f"good {seed}")) as device:
            self.acknowledged.append(device.hand_in(seed))
        return time.monotonic() - begun

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.coordinator.pid)


@contextlib.contextmanager
def attacked(
    folder: Path,
    policy: dict[str, object] | None = None,
    rule: str = "carry",
    options: Sequence[str] = (),
    limits: dict[str, object] | None = None,
    **admission: object,
) -> Iterator[Target]:
    """A coordinator that has served one good device; `unharmed` at the end of the block.

    `options`: for the command line of `serve`.

    Raises:
        AssertionError: it was harmed; says how.
    """
    config = configuration(folder, policy, rule, None, limits, **admission)
    with CoordinatorProcess(folder, config, *options) as coordinator:
        target = Target(coordinator)
        before_s = target.serve(1)
        memory, descriptors = target.process.memory_info().rss, target.process.num_fds()
        yield target
        unharmed(target, before_s, memory, descriptors)


def unharmed(target: Target, before_s: float, memory: int, descriptors: int) -> None:
    """All that must hold after an attack, whatever it was."""
    coordinator = target.coordinator
    assert coordinator.is_running(), coordinator.log.read_text()[-2000:]
    assert target.serve(2) < 20 * before_s + 10.0
    gc.collect()  # this side's own connections
    deadline = time.monotonic() + SETTLING_S
    while target.process.num_fds() > descriptors + MORE_DESCRIPTORS:
        assert time.monotonic() < deadline, target.process.net_connections()
        time.sleep(0.1)
    assert target.process.memory_info().rss < memory + MORE_MEMORY_BYTES
    assert coordinator.stop() == 0
    assert "Traceback" not in coordinator.log.read_text()
    Seen().check(coordinator.data, target.acknowledged)
