"""Words of strangers on the other side's terminal and in its log: one harmless line, and no forged one."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from edge_sdk.core.messages import PROBLEM_CONTENT_TYPE, Federation, JoinReply, NotNow, Training
from edge_sdk.core.records import to_json
from edge_sdk.model import base_model
from tests.coordinator.devices import FINGERPRINT
from tests.hostile.harness import Target, attacked, bearer, raw
from tests.models import build_model
from tests.processes import PATIENCE_S, command, environment

# A line of the log, hidden text, another title, text turned round, and line breaks by other names.
FORGED = (
    "x) joined\n00:00:00  version 99: 1000 updates\r\n\x1b[8m\x1b]0;t\x07\u202egnp.exe\u2066\u2028\x85\u200b"
)
LINE = re.compile(r"\d\d:\d\d:\d\d  \S|federation |listening on |to let a device in:  ")


def harmless(text: str) -> None:
    hidden = {
        f"{ord(c):04x}" for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")
    }
    assert hidden == set(), text
    assert re.search(r"^\s*00:00:00", text, re.MULTILINE) is None, text


def log_of(target: Target) -> str:
    """Every line is one that the coordinator began itself."""
    text = target.coordinator.log.read_text(encoding="utf-8", errors="strict")
    harmless(text)
    assert [line for line in text.splitlines() if not LINE.match(line)] == []
    return text


def test_a_name_with_a_forged_line(tmp_path: Path) -> None:
    """In the log, in `edge-coordinator status`, and in the status that others ask for."""
    with attacked(tmp_path) as target:
        with contextlib.closing(target.device(FORGED)) as device:
            host = bearer(target.coordinator.host_token)
            listed = device.http.get("/v1/status", headers=host).json()["devices"]
            assert all("\n" not in one["name"] and "\x1b" not in one["name"] for one in listed)
        with contextlib.closing(target.device("书房")):
            pass
        status = command("coordinator.cli", "status", "--data", target.coordinator.data)
        assert (status.returncode, status.stderr) == (0, "")
        harmless(status.stdout)
        assert r"x) joined\n00:00:00" in status.stdout
        assert "书房" in status.stdout
        log = target.coordinator.log
    assert r"(x) joined\n00:00:00  version 99: 1000 updates\r\n\x1b[8m" in log.read_text(encoding="utf-8")
    log_of(target)


def strings_of_a_stranger(target: Target) -> Iterator[bytes]:
    """Requests in which each string that the coordinator reads is a forged one, as far as HTTP lets it be."""
    name = quote(FORGED, safe="")
    for path in (
        f"/{name}",
        f"/v1/status?{name}={name}",
        f"/v1/versions/{name}/ranks/{name}/adapter_config.json",
    ):
        yield f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    loose = FORGED.replace("\r", "").replace("\n", "").encode()
    for head in (
        b"Host: %s",
        b"Authorization: Bearer %s",
        b"Upload-Offset: %s",
        b"Content-Type: %s",
        b"%s: x",
    ):
        yield b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\n" + head.replace(b"%s", loose) + b"\r\n\r\n"
    yield loose + b" /v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n"
    yield b"GET /" + loose + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    yield FORGED.encode() + b"\r\n\r\n"


def strings_of_a_member(target: Target) -> None:
    token, forged = bearer(target.coordinator.join_token), quote(FORGED, safe="")
    with contextlib.closing(target.device()) as device:
        for body in (
            {"name": FORGED, "fingerprint": FINGERPRINT, "profile": {"system": FORGED, FORGED: FORGED}},
            {"name": "x", "fingerprint": FORGED},
            {"name": "x", FORGED: FORGED},
            {"name": "\ud800" + FORGED, "fingerprint": FINGERPRINT},
            {"name": [FORGED], "fingerprint": FINGERPRINT},
        ):
            text = json.dumps(body).encode()
            device.http.post("/v1/join", content=text, headers=token)
        work = device.work()
        for body in ({"rank": FORGED}, {FORGED: 4}, {"digest": FORGED, "size_bytes": 1}):
            for path in (
                "/v1/assignments",
                f"/v1/assignments/{forged}/update",
                f"/v1/assignments/{work}/update",
            ):
                device.http.post(path, json=body)
        for path in (f"/v1/assignments/{forged}/adapter", f"/v1/assignments/{forged}/heartbeat"):
            device.http.patch(path, content=b"x", headers={"Upload-Offset": "0"})
            device.http.post(path, json={"steps_done": 1})
        for version, rank, dtype in ((forged, 4, "int8"), (0, forged, "int8"), (0, 4, forged)):
            device.http.get(f"/v1/versions/{version}/ranks/{rank}/{dtype}/adapter.safetensors")


def test_every_string_that_a_stranger_or_member_can_send(tmp_path: Path) -> None:
    with attacked(tmp_path) as target:
        for sent in strings_of_a_stranger(target):
            raw(target.coordinator, sent)
        strings_of_a_member(target)
        harmless(command("coordinator.cli", "status", "--data", target.coordinator.data).stdout)
    assert "refused (" in log_of(target)


# --- a coordinator's words on an owner's terminal -------------------------------------------------


class Liar(http.server.BaseHTTPRequestHandler):
    """Refuses everything below `/refuses` and `/odd`; below `/waits` it never has work. In forged words."""

    federation: Federation

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.rfile.read(length)
        path = self.path.removeprefix("/waits")
        if self.path.startswith("/refuses"):
            self._say(400, {"title": "bad message", "detail": FORGED}, PROBLEM_CONTENT_TYPE)
        elif self.path.startswith("/odd"):
            self._say(400, {"title": FORGED, "detail": FORGED}, PROBLEM_CONTENT_TYPE)
        elif path == "/v1/join":
            self._say(201, to_json(JoinReply("d-1", "secret", self.federation)))
        elif path == "/v1/federation":
            self._say(200, to_json(self.federation))
        else:
            self._say(503, to_json(NotNow(0.2, FORGED)))

    do_GET = do_POST = do_HEAD = do_PATCH = _answer  # noqa: N815

    def _say(self, status: int, record: object, kind: str = "application/json") -> None:
        body = json.dumps(record).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "base", "llama")


@pytest.fixture(scope="module")
def liar(model: Path) -> Iterator[str]:
    base = base_model.describe(str(model))
    Liar.federation = Federation(
        "f", base, FORGED, (2, 4), 8, 2.0, "balanced", Training(1, 1, 32), holds_global=False
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Liar) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def join(url: str, model: Path, folder: Path) -> list[str]:
    notes = folder / "notes.jsonl"
    notes.write_text('{"prompt": "turn the light on", "completion": "done"}\n')
    where = ["--token", "t", "--data", str(notes), "--state", str(folder / "state"), "--model", str(model)]
    how = ["--no-quantise", "--device", "cpu", "--name", FORGED, "--nice", "0", "--least-examples", "1"]
    return ["join", url, *where, *how]


@pytest.mark.parametrize("path", ["/refuses", "/odd"])
def test_a_refusal_in_forged_words(liar: str, model: Path, tmp_path: Path, path: str) -> None:
    joining = command("edge_sdk.cli", *join(liar + path, model, tmp_path))
    looking = command("edge_sdk.cli", "doctor", liar + path, "--token", "t", "--device", "cpu")
    assert joining.returncode == 2
    assert looking.returncode == 1
    for done in (joining, looking):
        assert "x) joined" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        harmless(done.stdout + done.stderr)
    assert joining.stderr.count("\n") == 1


def test_a_reason_to_wait_and_a_rule_in_forged_words(liar: str, model: Path, tmp_path: Path) -> None:
    """It goes on for as long as the owner lets it, and says why in one line each time."""
    with subprocess.Popen(
        [sys.executable, "-m", "edge_sdk.cli", *join(f"{liar}/waits", model, tmp_path)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        killer = threading.Timer(PATIENCE_S, process.kill)
        killer.start()
        said = ""
        for line in process.stdout:
            said += line
            if "version 99" in line:
                break
        process.send_signal(signal.SIGINT)
        said += process.stdout.read()
        killer.cancel()
    assert r"x) joined\n00:00:00  version 99" in said
    assert "Traceback" not in said
    harmless(said)
