"""`join --dry-run`: it joins nothing, and what it shows is what joining sends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk.cli import main
from edge_sdk.connection.transport import Transport
from edge_sdk.core.messages import JoinRequest
from edge_sdk.core.records import from_json
from edge_sdk.diagnosis import dry_run
from edge_sdk.membership import identity
from edge_sdk.model import base_model
from edge_sdk.options import Limits, Options
from tests.processes import CoordinatorProcess

CONFIG = 'base = "tiny"\n[federation]\nrule = "carry"\nladder = [2, 4]\nrank_cap = 8\n'


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorProcess]:
    with CoordinatorProcess(tmp_path_factory.mktemp("dry"), CONFIG) as process:
        yield process


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"prompt": "my secret", "completion": "kept"}\n' * 3)
    return path


def test_it_shows_what_is_sent_and_joins_nothing(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    arguments = ["join", coordinator.url, "--token", coordinator.join_token, "--data", str(data), "--dry-run"]
    arguments += ["--state", str(state), "--device", "cpu", "--name", "attic", "--memory-budget", "1GB"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "base: tiny (any)" in said
    assert "20 steps × 8 examples × 256 tokens = 40960" in said
    assert f'"fingerprint": "{base_model.describe("tiny").fingerprint}"' in said
    assert '"name": "attic"' in said
    assert f"{data}: 3 examples" in said
    assert "secret" not in said
    assert "Joining would end here" not in said
    transport = Transport(coordinator.url, coordinator.host_token)
    assert transport.status().devices == ()
    transport.close()
    assert not (state / "session.json").exists()


def test_the_record_is_the_one_that_joining_sends(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    options = Options(name="attic", state_dir=tmp_path, device="cpu", memory_budget_bytes=10**9)
    found = dry_run.examine(coordinator.url, coordinator.join_token, data, options)
    shown = from_json(JoinRequest, json.loads(found.sent[0].body))
    sent = identity.request(base_model.describe("tiny").fingerprint, options, "a" * 32)
    assert (shown.name, shown.fingerprint, set(shown.profile)) == (
        sent.name,
        sent.fingerprint,
        set(sent.profile),
    )


def test_what_is_beyond_a_limit_is_said(coordinator: CoordinatorProcess, data: Path, tmp_path: Path) -> None:
    options = Options(state_dir=tmp_path, limits=Limits(("org/other",), least_examples=1000))
    found = dry_run.examine(coordinator.url, coordinator.join_token, data, options)
    said = "\n".join(dry_run.lines(found))
    assert "refused   base: tiny (org/other)" in said
    assert "refused   examples behind an update" in said
    assert "Joining would end here: federation" in said


def test_it_needs_a_token(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGE_JOIN_TOKEN", raising=False)
    assert main(["join", "http://127.0.0.1:1", "--data", str(data), "--dry-run"]) == 2
    assert "needs its join token" in capsys.readouterr().err
