"""A coordinator that lies, driven by hypothesis against the real device, all of it but the training.

Whatever it answers, the device writes nothing outside its state folder, raises errors of the tree alone, each
in one line, and hands in its work as soon as it is told the truth.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_sdk.agent import Agent
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import EdgeError, subclasses
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import (
    Assignment,
    Directive,
    Federation,
    HeartbeatReply,
    JoinReply,
    Status,
    Training,
    UpdateReply,
)
from edge_sdk.core.profile import DeviceProfile
from edge_sdk.core.records import to_json
from edge_sdk.membership.adapter_cache import AdapterKey
from edge_sdk.model import base_model
from edge_sdk.options import Limits, Options
from edge_sdk.participation.collaborators import Collaborators
from edge_sdk.system import backoff
from edge_sdk.training.plan import StepReport
from edge_sdk.worker.messages import Finished, Job, Memory

PATIENCE_S = 60.0
LAPTOP = DeviceProfile("laptop", "Linux", "x86_64", "cpu", 4, 4, 16 << 30, memory_available_bytes=8 << 30)
NASTY: list[Any] = [-1, 0, 2, 10**400, -(10**400), 2**31, 2**63, 1e308, -0.5, math.nan, math.inf, True, None]
NASTY += ["", ".", "..", "../../out", "/tmp/out", "a\nb", "a\x1b[8m", "\ud800", "x" * 70_000, r"\\host\share"]
NASTY += [[], {}, [[]], {"self": 1}, "continue", "abandon", "finish", "other"]
TITLES = [kind.title for kind in subclasses(EdgeError)]


@dataclasses.dataclass(frozen=True)
class Lie:
    """What is answered in place of the truth: other bytes, or the true record with other values."""

    status: int = 200
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()
    places: tuple[tuple[float, Any], ...] = ()  # where in the record, from 0 to 1, and what stands there


def _documents() -> st.SearchStrategy[bytes]:
    members = st.dictionaries(
        st.sampled_from(
            ["self", "message", "detail", "status", "retry_after_s", "offset", "current_version"]
        ),
        st.sampled_from(NASTY),
    )
    return st.builds(
        lambda title, more: json.dumps({"title": title} | more).encode("utf-8", "replace"),
        st.sampled_from([*TITLES, "unheard of"]) | st.sampled_from(NASTY),
        members,
    )


headers = st.lists(
    st.sampled_from(
        [
            ("Upload-Offset", "-1"),
            ("Upload-Offset", "9" * 5000),
            ("Retry-After", "-5"),
            ("Retry-After", "9" * 40),
            ("Retry-After", "Mon, 01 Jan 99999999999 00:00:00 GMT"),
            ("Content-Encoding", "gzip"),
            ("Content-Type", "text/plain; charset=hex"),
            ("Content-Range", "bytes 0-1/99999999999999999999999"),
            ("Location", "file:///etc/passwd"),
            ("Date", "never"),
            ("ETag", "../../out"),
        ]
    ),
    max_size=2,
).map(tuple)
bodies = st.one_of(
    _documents(),
    st.binary(max_size=64),
    st.sampled_from([b"[" * 100_000, b"{" * 9, b"[]", b"{}", b"null", b"1" * 5000, b" " * (2 << 20)]),
)
lies = st.one_of(
    st.builds(
        Lie,
        st.sampled_from([200, 201, 202, 204, 206, 302, 400, 401, 404, 409, 416, 422, 500, 503]),
        bodies,
        headers,
    ),
    st.builds(
        lambda places: Lie(places=tuple(places)),
        st.lists(st.tuples(st.floats(0, 1), st.sampled_from(NASTY)), min_size=1, max_size=2),
    ),
)


class Liar(ThreadingHTTPServer):
    """Lies as often as it has lies, and tells the truth from then on."""

    daemon_threads = True

    def __init__(self, federation: Federation, told: list[Lie]) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.federation, self.lies = federation, list(told)
        self.adapter = codec.encode(
            {
                name: LoraFactors(np.zeros((o, 2), np.float32), np.zeros((2, i), np.float32))
                for name, (o, i) in federation.base.modules.items()
            },
            federation.scaling,
        )
        self.stored = 0
        self.delivered = 0
        self.directive: Directive = "continue"
        self.steps_done = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A device that hangs up in the middle of a lie is right."""


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Liar

    def log_message(self, *_: Any) -> None:
        pass

    def _any(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lie = self.server.lies.pop(0) if self.server.lies else None
        status, body, more = self._truth(sent)
        if lie is not None and lie.places and body[:1] == b"{":
            body = _spoilt(body, lie)
        elif lie is not None and not lie.places:
            status, body, more = lie.status, lie.body or b"", dict(lie.headers)
        self.send_response(status)
        for name, value in more.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(body)

    def _truth(self, sent: bytes) -> tuple[int, bytes, dict[str, str]]:
        it, path = self.server, self.path
        if self.command == "HEAD":
            return 200, b"", {"Upload-Offset": str(it.stored)}
        if self.command == "PATCH":
            it.stored = int(self.headers["Upload-Offset"]) + len(sent)
            return 204, b"", {"Upload-Offset": str(it.stored)}
        if path.endswith(".safetensors"):
            return 200, it.adapter, {"ETag": '"a"'}
        record: Any = it.federation
        if path.endswith("/join"):
            record = JoinReply("d-1", "secret", it.federation)
        elif path.endswith("/assignments"):
            it.stored = 0
            record = Assignment("a-1", 1, 2, 0, 4, 1, 60.0, "01ab" * 4)
        elif path.endswith("/heartbeat"):
            record = HeartbeatReply(it.directive)
        elif path.endswith("/update"):
            it.delivered += 1
            it.steps_done = json.loads(sent)["steps"]
            record = UpdateReply("u-1", 2)
        elif path.endswith("/status"):
            record = Status("f-1", 1, 0, 4, False, {"1": 2}, {"1": 0.0}, (), start="01ab" * 4)
        return 200, json.dumps(to_json(record)).encode(), {"Content-Type": "application/json"}


for method in ("GET", "POST", "HEAD", "PATCH"):
    setattr(Answers, f"do_{method}", Answers._any)


def _spoilt(body: bytes, lie: Lie) -> bytes:
    """The record with other values in some of its places."""
    value = json.loads(body)
    for share, nasty in lie.places:
        found = list(_places(value))
        within, at = found[min(len(found) - 1, int(share * len(found)))]
        within[at] = nasty
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for at in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, at
            yield from _places(value[at])


class Pretender:
    """A trainee that trains nothing, and hands in an adapter all the same."""

    def train(self, job: Job, on_step: Any) -> Finished:
        for step in range(1, job.plan.steps + 1):
            if on_step(StepReport(step, job.plan.steps, 1.0, 8 * step, 0.1)) == "finish":
                break
        content = Path(job.adapter).read_bytes() if job.adapter else b""
        Path(job.outbox).write_bytes(content)
        memory = Memory(0, 0, 0)
        digest = codec.sha256_file(Path(job.outbox))
        return Finished(2, digest, len(content), 8 * step, step, 2.0, 1.0, 0.1, memory)

    def generate(self, question: Any, on_text: Any = None) -> list[str]:
        return [""]

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def federation() -> Federation:
    base = base_model.describe("tiny")
    return Federation(
        "f-1", base, "flexlora", (2,), 4, 2.0, "balanced", Training(4, 8, 64), heartbeat_s=0.001
    )


class Truth:
    """A federation, in few words where a test fails."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation


@pytest.fixture(scope="module")
def truth(federation: Federation) -> Truth:
    return Truth(federation)


@pytest.fixture(scope="module", autouse=True)
def short_waits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backoff, "FIRST_S", 0.001)
        patch.setattr(backoff, "MOST_S", 0.01)
        patch.setattr(backoff, "MOST_ASKED_S", 0.01)
        yield


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(told=st.lists(lies, min_size=1, max_size=8))
def test_whatever_a_coordinator_answers(truth: Truth, told: list[Lie]) -> None:
    with tempfile.TemporaryDirectory() as name, Liar(truth.federation, told) as liar:
        outer = Path(name)
        (outer / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
        threading.Thread(target=liar.serve_forever, args=(0.01,), daemon=True).start()
        options = Options(
            name="attic",
            state_dir=outer / "deep" / "state",
            device="cpu",
            profile=LAPTOP,
            isolate=False,
            quantise=False,
            memory_budget_bytes=2 * 10**9,
            nice=0,
        )
        done, errors = 0, []
        for _ in range(len(told) + 2):
            agent = Agent(
                liar.url,
                data=outer / "data.jsonl",
                join_token="token",
                options=options,
                collaborators=Collaborators(make_worker=lambda *_: Pretender()),
            )
            giving_up = threading.Timer(PATIENCE_S, agent.request_stop)
            giving_up.start()
            try:
                done = agent.run(updates=1)
            except EdgeError as error:
                errors.append(error)
                assert len(str(error).splitlines()) == 1
            finally:
                giving_up.cancel()
                agent.close()
            if done:
                break
        liar.shutdown()
        assert done == 1, errors
        assert liar.delivered >= 1
        assert files_in(outer) - files_in(outer / "deep" / "state") >= {"data.jsonl", "deep", "deep/state"}
        beside = {at for at in files_in(outer) if not at.startswith("deep/state/")}
        assert beside == {"data.jsonl", "deep", "deep/state"}


@pytest.mark.parametrize("least", [8, 24, 32])
def test_told_to_finish_at_once_it_goes_on_to_the_least(
    federation: Federation, tmp_path: Path, least: int
) -> None:
    """An update of one step of a few records would tell of each; the owner says how many there must be."""
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    with Liar(federation, []) as liar:
        liar.directive = "finish"
        threading.Thread(target=liar.serve_forever, args=(0.01,), daemon=True).start()
        agent = Agent(
            liar.url,
            data=tmp_path / "data.jsonl",
            join_token="token",
            options=Options(
                state_dir=tmp_path / "state",
                device="cpu",
                profile=LAPTOP,
                isolate=False,
                quantise=False,
                memory_budget_bytes=2 * 10**9,
                nice=0,
                limits=Limits(least_examples=least),
            ),
            collaborators=Collaborators(make_worker=lambda *_: Pretender()),
        )
        assert agent.run(updates=1) == 1
        agent.close()
        liar.shutdown()
    assert liar.steps_done == least // 8


@pytest.mark.parametrize("id", ["/tmp/out", "../../out", "a/b", "a\nb", "", "x" * 65, "a\x1b[8m"])
def test_an_id_that_is_a_path_is_refused_and_nothing_is_kept(federation: Federation, id: str) -> None:
    """Of a federation, a device and an assignment: each becomes part of a file's name or of a path."""
    with pytest.raises(EdgeError, match="must be text of the form|start '") as caught:
        from_record(Federation, dataclasses.replace(federation, id=id))
    assert "\n" not in str(caught.value)
    with pytest.raises(EdgeError):
        from_record(JoinReply, JoinReply(id, "secret", federation))
    with pytest.raises(EdgeError):
        from_record(Assignment, Assignment(id, 1, 2, 0, 4, 1, 60.0))
    with pytest.raises(EdgeError):
        AdapterKey(1, 2, id or "/")


def from_record(kind: Any, record: Any) -> Any:
    from edge_sdk.core.records import from_json

    return from_json(kind, to_json(record))
