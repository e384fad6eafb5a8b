"""A process that has loaded the learning libraries once and forks devices, which can be killed and started
again within a second: `python -m tests.device_zygote`, driven by `Zygote`.

A line of JSON on its standard input describes a device; it answers with the process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.processes import PATIENCE_S, environment


class Zygote:
    """The side of the tests. Use it in a with statement."""

    def __enter__(self) -> Zygote:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.device_zygote"],
            env=environment() | {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._children: list[int] = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in self._children:
            kill(pid)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._process.stdin.close()
        self._process.stdout.close()

    def start(self, **device: Any) -> int:
        """Fork a device: `url`, `token`, `state`, `data`, `log`, `model`, and if need be `updates` and

        `file_bytes`, the longest file that its process can write. Returns its process id.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps({key: str(v) if isinstance(v, Path) else v for key, v in device.items()})
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        self._children.append(pid)
        return pid


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def kill(pid: int) -> None:
    """SIGKILL, and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while lives(pid):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def events_in(log: Path) -> list[dict[str, Any]]:
    """What a device has said; a line that a kill cut short is left out."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [json.loads(line) for line in lines]


def run(it: dict[str, Any]) -> None:
    """Be a device until the work is done."""
    from edge_sdk.agent import Agent
    from edge_sdk.core.errors import EdgeError
    from edge_sdk.options import Limits, Options

    with Path(it["log"]).open("a", buffering=1) as log:

        def note(event: Any) -> None:
            log.write(json.dumps(asdict(event)) + "\n")

        if "file_bytes" in it:
            resource.setrlimit(resource.RLIMIT_FSIZE, (it["file_bytes"], resource.RLIM_INFINITY))
        state = Path(it["state"])
        options = Options(
            name=state.name,
            state_dir=state,
            device="cpu",
            memory_budget_bytes=10**9,
            isolate=False,
            quantise=False,
            nice=0,
            model=it["model"],
            limits=Limits(least_examples=1),
        )
        try:
            agent = Agent(it["url"], data=it["data"], join_token=it["token"], options=options, on_event=note)
            agent.run(updates=it.get("updates"))
        except EdgeError as error:
            log.write(json.dumps({"kind": "failed", "text": str(error)}) + "\n")


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries the children
    import torch

    from edge_sdk.model import base_model
    from edge_sdk.system import backoff

    backoff.FIRST_S, backoff.MOST_S = 0.05, 0.5
    torch.set_num_threads(1)
    base_model.import_libraries()

    for line in sys.stdin.buffer:
        if (pid := os.fork()) == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, 0)
            os.dup2(nothing, 1)
            try:
                run(json.loads(line))
            finally:
                os._exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
