"""Nobody is told anything: connections go to the coordinator that the owner named, or to the model hub."""

from __future__ import annotations

import ast
import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import PATIENCE_S, CoordinatorProcess, environment, toml

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for name in ("edge_sdk", "coordinator") for path in (ROOT / name).rglob("*.py"))

# What can open a connection, and where it is imported. asyncio opens some only by the calls of OPENS.
NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "httpx", "requests", "aiohttp", "websockets"}
NETWORK |= {
    "ftplib",
    "smtplib",
    "poplib",
    "imaplib",
    "telnetlib",
    "socketserver",
    "xmlrpc",
    "huggingface_hub",
}
OPENS = {"open_connection", "create_connection", "open_unix_connection", "sock_connect", "connect_ex"}
WHERE = ("edge_sdk/connection/", "edge_sdk/model/", "coordinator/web/")

TELLTALE = re.compile(r"telemetry|analytics|sentry|posthog|mixpanel|segment\.io|datadog|opentelemetry", re.I)
MENTIONS = {"edge_sdk/model/files.py"}  # switches that of the hub's client off
EXAMPLES = r"127\.|localhost|192\.168\.|\[?host\b|[\w.-]+\.example|\{"
ADDRESS = re.compile(rf"https?://(?!{EXAMPLES})[\w.-]+", re.I)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        else:
            continue
        yield from (name.split(".")[0] for name in names if name != "urllib.parse")  # which reads addresses


def test_what_can_open_a_connection_is_imported_where_connections_belong() -> None:
    elsewhere = {shown(path): set(imported(path)) & NETWORK for path in FILES}
    elsewhere = {name: found for name, found in elsewhere.items() if found and not name.startswith(WHERE)}
    assert elsewhere == {}


def test_the_coordinator_opens_no_connection() -> None:
    for path in FILES:
        if shown(path).startswith("coordinator/"):
            names = {
                node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
            }
            assert names & OPENS == set(), path
            assert set(imported(path)) & {"httpx", "requests", "urllib3", "huggingface_hub"} == set(), path


def test_no_file_speaks_of_telemetry_or_names_an_address() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert shown(path) in MENTIONS or not TELLTALE.search(text), path
        tree = list(ast.walk(ast.parse(text)))
        said = {id(node.value) for node in tree if isinstance(node, ast.Expr)}  # docstrings
        strings = {n.value for n in tree if isinstance(n, ast.Constant) and id(n) not in said}
        named = {found for one in strings if isinstance(one, str) for found in ADDRESS.findall(one)}
        assert named <= {"https://pytorch.org"}, path  # advice to a person


# --- as it runs -----------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """Stands for the model hub, and notes what it is told."""

    told: list[str] = []  # noqa: RUF012  of all requests

    def do_GET(self) -> None:
        self.told.append(self.headers["User-Agent"])
        self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Hub.told.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_hub_hears_which_model_is_wanted_and_nothing_of_this_machine(hub: str, tmp_path: Path) -> None:
    code = "import torch\nfrom edge_sdk.model import files\nfiles.resolve('org/name')"
    environ = environment() | {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert "hub cannot be reached" in done.stderr, done.stderr
    assert Hub.told
    assert [agent for agent in Hub.told if "torch/" in agent or "agent/" in agent] == []


WATCHING = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        with open(os.environ["SEEN"], "a") as file:
            file.write(f"{event} {arguments[1:2] if event != 'socket.getaddrinfo' else arguments[:2]}\\n")
sys.addaudithook(watch)
"""


def test_a_device_connects_to_its_coordinator_alone(tmp_path: Path) -> None:
    """From joining to an update, in the process of its owner and in the one that trains."""
    (tmp_path / "watching").mkdir()
    (tmp_path / "watching" / "sitecustomize.py").write_text(WATCHING)
    data, seen = tmp_path / "notes.jsonl", tmp_path / "seen"
    data.write_text("".join(json.dumps({"text": f"a note of mine, number {n}"}) + "\n" for n in range(40)))
    sections: dict[str, dict[str, object]] = {
        "training": {"steps": 2, "batch": 8},
        "federation": {"ladder": [2]},
    }
    config = toml(sections, Path("tiny"))
    with CoordinatorProcess(tmp_path, config) as coordinator:
        environ = environment()
        environ |= {"SEEN": str(seen), "PYTHONPATH": f"{tmp_path / 'watching'}:{environ['PYTHONPATH']}"}
        del environ["HF_HUB_OFFLINE"]
        command = [sys.executable, "-m", "edge_sdk.cli", "join", coordinator.url, "--data", str(data)]
        command += ["--token", coordinator.join_token, "--state", str(tmp_path / "state"), "--updates", "1"]
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False
        )
        assert done.returncode == 0, done.stderr
        lines = set(seen.read_text().splitlines())
    assert lines
    port = str(coordinator.port)
    assert [line for line in lines if "127.0.0.1" not in line or port not in line] == []
