"""Real processes for tests: a coordinator that can be killed and started again, and one-shot commands."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import psutil

from edge_sdk.connection.transport import Transport
from edge_sdk.connection.trust import Trust
from edge_sdk.core.messages import Status

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 60.0  # of a loaded machine; nothing here takes a tenth of it
MOST_BYTES = 1 << 30  # of a download, where a test is about something else


def environment() -> dict[str, str]:
    """One compute thread, no model hub, and no join token from the caller's shell."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("EDGE_JOIN_TOKEN", "EDGE_COORDINATOR_FAIL")
    }
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def command(
    module: str, *arguments: object, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` to its end, with `environ` besides."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=environment() | dict(environ or {}),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def workers() -> set[int]:
    """Ids of the processes that train for this one, without those that have ended."""
    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends at this moment, or waits to be buried
            if "edge_sdk.worker.main" in child.cmdline():
                found.add(child.pid)
    return found


class CoordinatorProcess:
    """`edge-coordinator serve` on a folder. It outlives no test: use it in a with statement.

    Its port is a free one at the first start and the same from then on, as a host's would be. `before` is put
    before its command line, `options` behind it, and `environment` into its environment, at the next start.
    """

    def __init__(self, folder: Path, config: str, *options: str) -> None:
        self.data = folder / "data"
        self.config = folder / "coordinator.toml"
        self.config.write_text(config)
        self.log = folder / "coordinator.log"
        self.port = 0
        self.before: list[str] = []
        self.options = list(options)
        self.scheme, self.pin = "http", ""
        self.environment: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> CoordinatorProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def invitation(self) -> str:
        """What a device on this machine joins by."""
        ending = f".{self.pin}" if self.pin else ""
        return f"flexlora+{self.url}/#{self.join_token}{ending}"

    @property
    def join_token(self) -> str:
        return (self.data / "join-token").read_text().strip()

    @property
    def host_token(self) -> str:
        return (self.data / "host-token").read_text().strip()

    def start(self) -> None:
        """Start, and return when it listens."""
        with self.log.open("ab") as log:
            written = log.tell()
            self._process = subprocess.Popen(
                [
                    *self.before,
                    *(sys.executable, "-m", "coordinator.cli", "serve"),
                    *("--data", str(self.data), "--config", str(self.config), "--port", str(self.port)),
                    *self.options,
                ],
                env=environment() | self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + PATIENCE_S
        while True:
            said = self.log.read_bytes()[written:].decode()
            if found := re.search(r"listening on (https?)://\S+:(\d+)\S*\nto let a device in:", said):
                self.scheme, self.port = found[1], int(found[2])
                self.pin = self._announced_pin() if self.scheme == "https" else ""
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the coordinator does not listen: {said}")
            time.sleep(0.02)

    def status(self) -> Status:
        """What it tells its host."""
        with contextlib.closing(Transport(self.url, self.host_token, trust=Trust(self.pin))) as transport:
            return transport.status()

    def _announced_pin(self) -> str:
        """As it stands in invitations."""
        with contextlib.closing(sqlite3.connect(self.data / "coordinator.sqlite")) as database:
            query = "SELECT value FROM meta WHERE key = 'announcement'"
            ((text,),) = database.execute(query).fetchall()
        return str(json.loads(text)["pin"])

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait(self) -> int:
        """Until it ends by itself; its exit code."""
        assert self._process is not None
        code = self._process.wait(PATIENCE_S)
        self._process = None
        return code

    def kill(self) -> None:
        """SIGKILL: it gets no chance to tidy up."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(number)
        code = self._process.wait(PATIENCE_S)
        self._process = None
        return code


def toml(sections: Mapping[str, Mapping[str, object]], base: Path) -> str:
    """A configuration file with this base record. Values: numbers, strings, lists of numbers."""
    lines = [f"base = '{base}'"]
    for name, values in sections.items():
        lines.append(f"[{name}]")
        lines += [
            f"{key} = {value!r}".replace("True", "true").replace("False", "false")
            for key, value in values.items()
        ]
    return "\n".join(lines) + "\n"
