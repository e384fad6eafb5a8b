"""Real proxies before a real coordinator, configured as docs/HOSTING.md says; skipped where there is none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from edge_sdk.connection.transport import Transport
from edge_sdk.connection.trust import Trust
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import JoinRequest
from tests.certificates import Pair, pair
from tests.coordinator.devices import FINGERPRINT, SCALING, Device
from tests.processes import MOST_BYTES, PATIENCE_S, CoordinatorProcess, command, toml

NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
CADDY = shutil.which("caddy")
without_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx on this machine (Debian: nginx-light)")
without_caddy = pytest.mark.skipif(CADDY is None, reason="no caddy on this machine")

SHAPES = {f"model.layers.{number}.q_proj": (1024, 1024) for number in range(8)}
RANK = 16  # 1 MB of adapter in float32

NGINX_FILE = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; {user}
events {{}}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port} {tls};
    {site}
  }}
}}
"""
CADDY_FILE = """
{{
  admin off
  auto_https off
  storage file_system {folder}
}}
{scheme}://127.0.0.1:{port} {{
  {tls}
  {site}
}}
"""
HEADERS = """
      proxy_http_version 1.1;
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_set_header X-Forwarded-Proto $scheme;
"""


@dataclass(frozen=True)
class Site:
    """What a host wrote: into the proxy's configuration, and into the coordinator's."""

    text: str
    serving: str = ""
    path: str = ""
    tls: bool = True
    program: str = "nginx"


SITES = {
    "all of a name": Site("location / { proxy_pass http://127.0.0.1:{upstream};{headers} }"),
    "a prefix that nginx takes away": Site(
        "location /federation/ { proxy_pass http://127.0.0.1:{upstream}/;{headers} }", path="/federation"
    ),
    "a prefix that stays": Site(
        "location /federation/ { proxy_pass http://127.0.0.1:{upstream};{headers} }",
        "path_prefix = '/federation'",
        "/federation",
    ),
    "without buffers": Site(
        "location / { proxy_pass http://127.0.0.1:{upstream};{headers}"
        " proxy_request_buffering off; proxy_buffering off; }"
    ),
    "small bodies": Site(
        "client_max_body_size 100k; location / { proxy_pass http://127.0.0.1:{upstream};{headers} }"
    ),
    "plain, on this machine": Site(
        "location / { proxy_pass http://127.0.0.1:{upstream};{headers} }", tls=False
    ),
    "caddy": Site("reverse_proxy 127.0.0.1:{upstream}", program="caddy"),
    "a prefix that caddy takes away": Site(
        "handle_path /federation/* {\n reverse_proxy 127.0.0.1:{upstream}\n }",
        "",
        "/federation",
        program="caddy",
    ),
    "a prefix that caddy leaves": Site(
        "handle /federation/* {\n reverse_proxy 127.0.0.1:{upstream}\n }",
        "path_prefix = '/federation'",
        "/federation",
        program="caddy",
    ),
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def proxy(folder: Path, site: Site, upstream: int, port: int, certificate: Pair) -> Iterator[None]:
    """One that runs in a folder of its own as this user, until the end of the block."""
    folder.mkdir()
    path, cert, key = folder / "proxy.conf", certificate.cert_file, certificate.key_file
    written = site.text.replace("{upstream}", str(upstream)).replace("{headers}", HEADERS)
    if site.program == "nginx":
        written += f"ssl_certificate {cert}; ssl_certificate_key {key};" if site.tls else ""
        user = "user root;" if os.geteuid() == 0 else ""
        tls = "ssl" if site.tls else ""
        path.write_text(NGINX_FILE.format(folder=folder, user=user, port=port, tls=tls, site=written))
        command = [str(NGINX), "-c", str(path), "-p", str(folder)]
    else:
        tls = f"tls {cert} {key}"
        path.write_text(CADDY_FILE.format(folder=folder, scheme="https", port=port, tls=tls, site=written))
        command = [str(CADDY), "run", "--config", str(path), "--adapter", "caddyfile"]
    with (folder / "output").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HOME": str(folder)})
        try:
            wait_for(port, process, folder / "output")
            yield
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def configuration(folder: Path, serving: str) -> str:
    base = folder / "base.json"
    base.write_text(json.dumps({"model": "made of numpy", "fingerprint": FINGERPRINT, "modules": SHAPES}))
    federation: dict[str, object] = {"ladder": [RANK], "rank_cap": RANK, "scaling": SCALING, "rule": "carry"}
    federation |= {"upload_dtype": "float32", "download_dtype": "float32"}
    sections: dict[str, dict[str, object]] = {
        "federation": federation,
        "policy": {"buffer_size": 1, "retry_s": 0.1},
        "admission": {"reach_factor": 1e9},
    }
    return toml(sections, base) + f"[serving]\n{serving}\n"


def adapter() -> bytes:
    draw = np.random.default_rng(1)

    def some(*shape: int) -> np.ndarray:
        return (0.1 * draw.standard_normal(shape)).astype(np.float32)

    return codec.encode(
        {name: LoraFactors(some(out, RANK), some(RANK, in_)) for name, (out, in_) in SHAPES.items()}, SCALING
    )


WHERE_THERE_IS_ONE = {"nginx": without_nginx, "caddy": without_caddy}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=WHERE_THERE_IS_ONE[site.program]) for name, site in SITES.items()]
)
def test_a_device_joins_works_and_hands_in_behind_it(name: str, tmp_path: Path) -> None:
    site, port = SITES[name], free_port()
    made = pair(tmp_path, "site", "127.0.0.1", "localhost")
    url = f"{'https' if site.tls else 'http'}://127.0.0.1:{port}{site.path}"
    serving = f"trusted_proxies = ['127.0.0.1']\npublic_url = '{url}'\n{site.serving}"
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path, serving)) as coordinator,
        proxy(tmp_path / "proxy", site, coordinator.port, port, made),
    ):
        said = command("coordinator.cli", "invite", "--data", coordinator.data).stdout
        assert f"'flexlora+{url}{'' if site.path else '/'}#" in said
        trust = Trust(ca=made.cert_file)
        with contextlib.closing(Transport(url, coordinator.join_token, trust=trust)) as joining:
            reply = joining.join(JoinRequest("attic", FINGERPRINT))
        with contextlib.closing(Transport(url, reply.credential, trust=trust)) as transport:
            device = Device(transport, reply.device_id, reply.credential)
            work, content = device.work(RANK), adapter()
            assert len(content) > 1_000_000
            device.hand_in(work, content)
            deadline = time.monotonic() + PATIENCE_S
            while transport.newest().version < 1:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            target = tmp_path / "adapter"
            transport.download(1, RANK, target, most_bytes=MOST_BYTES)
            assert target.stat().st_size > 1_000_000
        assert "Traceback" not in coordinator.log.read_text()


@pytest.mark.parametrize(
    "name",
    [pytest.param("all of a name", marks=without_nginx), pytest.param("caddy", marks=without_caddy)],
)
def test_the_log_names_who_asked_the_proxy_and_not_the_proxy(name: str, tmp_path: Path) -> None:
    site, port = SITES[name], free_port()
    made = pair(tmp_path, "site", "127.0.0.1")
    serving = f"trusted_proxies = ['127.0.0.1']\npublic_url = 'https://127.0.0.1:{port}'"
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path, serving)) as coordinator,
        proxy(tmp_path / "proxy", site, coordinator.port, port, made),
    ):
        context = Trust(ca=made.cert_file).context("https://")
        transport = httpx.HTTPTransport(local_address="127.0.0.9", verify=context)
        with httpx.Client(transport=transport) as client:
            answer = client.get(
                f"https://127.0.0.1:{port}/v1/federation", headers={"X-Forwarded-For": "6.6.6.6"}
            )
        assert answer.status_code == 401
        assert "from 127.0.0.9: GET /v1/federation" in coordinator.log.read_text()
