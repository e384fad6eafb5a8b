"""The device owner's mistakes: one line that names what is wrong, exit code 2, no traceback."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.cli import main
from edge_sdk.core.records import to_json
from edge_sdk.model import base_model
from tests.models import build_model
from tests.processes import CoordinatorProcess, command, toml

RECORD = '{"prompt": "turn the light on", "completion": "done"}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("federation")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return build_model(folder / "base", "llama")


@pytest.fixture(scope="module")
def coordinator(folder: Path, model: Path) -> Iterator[CoordinatorProcess]:
    (folder / "base.json").write_text(json.dumps(to_json(base_model.describe(str(model)))))
    config = toml({"training": {"steps": 1, "batch": 8, "sequence_len": 32}}, folder / "base.json")
    with CoordinatorProcess(folder, config) as process:
        yield process


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "notes.jsonl"
    path.write_text(RECORD)
    return path


class Refusal:
    """Runs the command in this process, and checks how it ends."""

    def __init__(self, state: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._state, self._model, self._capsys = state, model, capsys

    def __call__(self, *arguments: object) -> str:
        """The one line on stderr of a command that must fail."""
        self._capsys.readouterr()  # what building a model says
        state = [] if "--state" in arguments else ["--state", str(self._state)]
        state += [] if "--model" in arguments else ["--model", str(self._model)]
        code = main(["join", "--nice=0", *map(str, arguments), *state])  # nobody can take niceness back
        said = self._capsys.readouterr()
        assert code == 2, said
        assert said.err.startswith("edge-sdk: ")
        assert said.err.count("\n") == 1, said.err
        return said.err


@pytest.fixture
def refused(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(tmp_path / "state", model, capsys)


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "notes.jsonl: no such file"),
        ("", "notes.jsonl: holds no records"),
        ("\n  \n", "notes.jsonl: holds no records"),
        (RECORD + "turn the light on\n", "notes.jsonl:2: not JSON"),
        (RECORD + "\n[1, 2]\n", "notes.jsonl:3: a JSON list, not an object"),
        (RECORD + '{"title": "no text here"}\n', "notes.jsonl:2: no usable text"),
        ('{"prompt": "a question", "completion": " "}\n', "notes.jsonl:1: 'completion' is empty"),
        ('{"text": 3}\n', "notes.jsonl:1: 'text' is a JSON int"),
    ],
)
def test_bad_data_is_named_by_file_and_line(
    refused: Refusal, coordinator: CoordinatorProcess, tmp_path: Path, content: str | None, reason: str
) -> None:
    path = tmp_path / "notes.jsonl"
    if content is not None:
        path.write_text(content)
    assert reason in refused(coordinator.url, "--data", path, "--token", coordinator.join_token)


def test_a_folder_is_no_data(refused: Refusal, coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    said = refused(coordinator.url, "--data", tmp_path, "--token", coordinator.join_token)
    assert f"{tmp_path}: cannot be read" in said


# --- the other end --------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_coordinator_that_is_not_there(refused: Refusal, data: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    said = refused(url, "--data", data, "--token", "t")
    assert f"no coordinator answers at {url}" in said
    assert "check the address" in said


def test_a_host_that_is_not_there(refused: Refusal, data: Path) -> None:
    assert "no coordinator answers at https://no.invalid" in refused(
        "https://no.invalid", "--data", data, "--token", "t"
    )


@pytest.mark.parametrize(
    "url",
    [
        "notaurl",
        "",
        "ftp://host",
        "http://",
        "http://host:99999999",
        "http://[::1",
        "http://a b",
        "file:///etc",
    ],
)
def test_an_address_that_is_none(refused: Refusal, data: Path, url: str) -> None:
    said = refused(url, "--data", data, "--token", "t")
    assert f"{url.rstrip('/')!r} is no address of a coordinator; write it like https://" in said


class Stranger(http.server.BaseHTTPRequestHandler):
    """A web server of another kind: /html answers a page, /json a document, anything else 404."""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        body = {"html": b"<html>hello</html>", "json": b'{"hello": 1}'}.get(kind, b"<html>nothing</html>")
        self.send_response(200 if kind in ("html", "json") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def stranger() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/html", "does not answer like a coordinator; check the address"),
        ("/json", "/json: Federation.id is missing"),
        ("/other", "is it a coordinator?"),
    ],
)
def test_a_server_that_is_no_coordinator(
    refused: Refusal, stranger: str, data: Path, path: str, reason: str
) -> None:
    assert reason in refused(stranger + path, "--data", data, "--token", "t")


@pytest.mark.parametrize("token", ["wrong", "with space ", "tökén", "two\nlines"])
def test_a_wrong_token(refused: Refusal, coordinator: CoordinatorProcess, data: Path, token: str) -> None:
    assert "token" in refused(coordinator.url, "--data", data, "--token", token)


def test_no_token_at_all(
    refused: Refusal, coordinator: CoordinatorProcess, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGE_JOIN_TOKEN", raising=False)
    assert "give it the federation's join token" in refused(coordinator.url, "--data", data)


def test_another_base_model(
    refused: Refusal, coordinator: CoordinatorProcess, tmp_path: Path, data: Path, model: Path
) -> None:
    arguments = (coordinator.url, "--data", data, "--token", coordinator.join_token)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    ours, theirs = (base_model.describe(str(path)).fingerprint[:12] for path in (other, model))
    assert ours != theirs
    said = refused(*arguments, "--model", other)
    assert f"this device's base model has fingerprint {ours}" in said
    assert f"{model} with {theirs}; load that model" in said


def test_a_base_model_of_another_architecture(
    refused: Refusal, coordinator: CoordinatorProcess, tmp_path: Path, data: Path, model: Path
) -> None:
    other = build_model(tmp_path / "other", "gpt2")
    said = refused(coordinator.url, "--data", data, "--token", coordinator.join_token, "--model", other)
    assert "'model.layers.0.self_attn.q_proj' is no linear layer of other" in said
    assert f"the federation trains {model}: load that model" in said


def test_a_base_model_that_is_not_there(
    refused: Refusal, coordinator: CoordinatorProcess, tmp_path: Path, data: Path
) -> None:
    arguments = (coordinator.url, "--data", data, "--token", coordinator.join_token, "--model")
    assert "nowhere: no such model directory" in refused(*arguments, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty: holds no config.json" in refused(*arguments, tmp_path / "empty")


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["much", "6 parsecs", "-1GB", "0", "nan", "1e999GB", "GB"])
def test_a_memory_budget_that_is_no_size(refused: Refusal, data: Path, size: str) -> None:
    said = refused("http://127.0.0.1:1", "--data", data, "--token", "t", f"--memory-budget={size}")
    assert f"{size!r} is not a size; write it like 6GB" in said


def test_a_memory_budget_in_which_nothing_fits(
    refused: Refusal, coordinator: CoordinatorProcess, data: Path
) -> None:
    said = refused(
        coordinator.url, "--data", data, "--token", coordinator.join_token, "--memory-budget", "1kB"
    )
    assert "not enough memory to train: rank 2" in said


def test_a_profile_that_nobody_knows(refused: Refusal, data: Path, tmp_path: Path) -> None:
    arguments = ("http://127.0.0.1:1", "--data", data, "--token", "t", "--profile")
    assert "toaster" in refused(*arguments, "toaster")
    (tmp_path / "mine.toml").write_text("name = ")
    assert "mine.toml" in refused(*arguments, tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--duty", "0", "duty 0.0 must be above 0"),
        ("--duty", "nan", "duty nan must be above 0"),
        ("--threads", "0", "threads 0 must be 1 or more"),
        ("--nice", "20", "nice 20 must be from 0"),
        ("--hours", "22-7", "hours '22-7' is no interval; write it like 22:00-07:00"),
        ("--battery-above", "100", "battery_above 100 must be a percentage"),
        ("--cpu-below", "0", "cpu_below 0 must be a percentage"),
        ("--updates", "0", "--updates 0 must be 1 or more"),
        ("--device", "quantum", "device 'quantum' is not available here"),
    ],
)
def test_a_setting_out_of_range(
    refused: Refusal, coordinator: CoordinatorProcess, data: Path, flag: str, value: str, reason: str
) -> None:
    arguments = (coordinator.url, "--data", data, "--token", coordinator.join_token)
    assert reason in refused(*arguments, f"{flag}={value}")


def test_a_configuration_file(refused: Refusal, data: Path, tmp_path: Path) -> None:
    """The file tells what the flags do not; what neither tells is asked for."""
    path = tmp_path / "device.toml"
    assert "device.toml: No such file" in refused("--config", path)
    path.write_text("thread = 1\n")
    assert f"{path}: unknown key 'thread'; the keys are url, data" in refused("--config", path)
    path.write_text("")
    assert "give the address of the coordinator" in refused("--config", path)
    path.write_text("url = 'notaurl'\n")
    assert "give --data FILE" in refused("--config", path)
    path.write_text("url = 'notaurl'\ndata = 'notes.jsonl'\n[conditions]\nunmetered = true\n")
    assert "device has not joined yet" in refused("--config", path)
    assert "'notaurl' is no address" in refused("--config", path, "--token", "t")
    assert "'alsonone' is no address" in refused("alsonone", "--config", path, "--token", "t")


def test_chat_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = ["--state", str(tmp_path / "state")]
    capsys.readouterr()
    assert main(["chat", "notaurl", *state, "--max-new-tokens", "0"]) == 2
    assert capsys.readouterr().err == "edge-sdk: --max-new-tokens 0 must be 1 or more\n"
    assert main(["chat", f"http://127.0.0.1:{free_port()}", *state, "--token", "t"]) == 2
    assert "no coordinator answers" in capsys.readouterr().err


def test_a_state_folder_that_cannot_be_one(refused: Refusal, data: Path, tmp_path: Path) -> None:
    said = refused("http://127.0.0.1:1", "--data", data, "--token", "t", "--state", data)
    assert f"{data}: no usable state folder" in said
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "session.json").write_text("{")
    assert "session.json: not a session" in refused("http://127.0.0.1:1", "--data", data, "--token", "t")


def test_base_of_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["base", str(tmp_path / "nowhere")]) == 2
    assert "no such model directory" in capsys.readouterr().err


def test_a_whole_process_ends_the_same_way(tmp_path: Path, data: Path) -> None:
    done = command(
        "edge_sdk.cli", "join", "notaurl", "--data", data, "--token", "t", "--state", tmp_path / "state"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("edge-sdk: 'notaurl' is no address of a coordinator")
    assert done.stderr.count("\n") == 1


def test_a_rank_larger_than_the_module(tmp_path: Path, model: Path, folder: Path) -> None:
    (tmp_path / "base.json").write_text(json.dumps(to_json(base_model.describe(str(model)))))
    (tmp_path / "c.toml").write_text(
        toml({"federation": {"ladder": [2, 1000], "rank_cap": 1000}}, tmp_path / "base.json")
    )
    done = command("coordinator.cli", "serve", "--data", tmp_path / "d", "--config", tmp_path / "c.toml")
    assert done.returncode == 2
    assert "federation.ladder reaches rank 1000, larger than any module" in done.stderr
    assert done.stderr.count("\n") == 1
