"""The link's throughput: which transfers count, how they are smoothed, and that real ones are measured."""

from __future__ import annotations

import http.server
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.connection.link_speed import KEPT, LEAST_BYTES, LinkSpeed, load_link, save_link
from edge_sdk.connection.transport import Transport
from edge_sdk.core.adapter_file.codec import encode
from edge_sdk.core.errors import Unreachable
from edge_sdk.core.lora import LoraFactors
from tests.processes import MOST_BYTES

MB = 1_000_000
SIZE_BYTES = 3 * LEAST_BYTES
ADAPTER = encode({"layer": LoraFactors(np.ones((64, 128), np.float32), np.ones((128, 256), np.float32))}, 1.0)
rates = st.floats(1, 1e12)


def after(*seconds: float) -> LinkSpeed:
    """A link after uploads of 1 MB that took so long."""
    link = LinkSpeed()
    for duration in seconds:
        link = link.with_upload(MB, duration)
    return link


def test_nothing_measured_is_none() -> None:
    assert (LinkSpeed().upload_bytes_s, LinkSpeed().download_bytes_s) == (None, None)


def test_directions_are_apart() -> None:
    link = LinkSpeed().with_upload(MB, 2.0).with_download(MB, 0.5)
    assert (link.upload_bytes_s, link.download_bytes_s) == (500_000, 2_000_000)


def test_the_lower_median_of_the_last_five() -> None:
    assert after(1.0, 2.0).upload_bytes_s == 500_000  # of two, the slower
    assert after(1.0, 2.0, 4.0).upload_bytes_s == 500_000
    assert after(100.0, 100.0, 1.0, 1.0, 2.0, 2.0, 2.0).uploads == (MB, MB, MB / 2, MB / 2, MB / 2)


@given(st.lists(rates, min_size=2, max_size=4), st.floats(1e-9, 1e15), st.integers(0, 4))
def test_one_outlier_cannot_leave_the_range_of_the_others(usual: list[float], odd: float, place: int) -> None:
    mixed = (*usual[:place], odd, *usual[place:])
    found = LinkSpeed(uploads=mixed).upload_bytes_s
    assert found is not None
    assert found <= max(usual)
    if len(usual) > 2:
        assert min(usual) <= found


@given(st.integers(0, LEAST_BYTES - 1), st.floats(0, 1e6))
def test_small_transfers_say_nothing(size_bytes: int, seconds: float) -> None:
    assert (
        LinkSpeed().with_upload(size_bytes, seconds)
        == LinkSpeed().with_download(size_bytes, seconds)
        == LinkSpeed()
    )


def test_a_transfer_that_took_no_time_says_nothing() -> None:
    assert LinkSpeed().with_upload(MB, 0.0) == LinkSpeed()


@given(st.lists(rates, max_size=KEPT).map(tuple), st.lists(rates, max_size=KEPT).map(tuple))
def test_it_is_remembered(
    tmp_path_factory: pytest.TempPathFactory, ups: tuple[float, ...], downs: tuple[float, ...]
) -> None:
    path = tmp_path_factory.mktemp("link") / "link.json"
    save_link(path, LinkSpeed(ups, downs))
    assert load_link(path) == LinkSpeed(ups, downs)


@pytest.mark.parametrize(
    "content", [None, b"", b"[]", b"\xff", b'{"uploads": ["x"]}', b'{"uploads": [-1.0]}']
)
def test_a_damaged_file_means_not_measured(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "link.json").write_bytes(content)
    assert load_link(tmp_path / "link.json") == LinkSpeed()


def test_a_disk_that_takes_nothing_ends_no_transfer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "gone").touch()
    with caplog.at_level(logging.WARNING, "edge_sdk"):
        save_link(tmp_path / "gone" / "link.json", after(1.0))
    assert "the link is measured anew next time" in caplog.text


# --- real transfers ---------------------------------------------------------------------------------


MOST_BODY_BYTES = 1 << 20  # as nginx has it unless told otherwise
taken: list[int] = []  # bodies of uploads
refused: list[int] = []  # of those that are too large for the proxy


class Files(http.server.BaseHTTPRequestHandler):
    """Serves ADAPTER to any GET, promises more than it sends below version 9, and takes any upload."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        broken = "/versions/9/" in self.path
        self.send_header("Content-Length", str(len(ADAPTER) * (2 if broken else 1)))
        self.end_headers()
        self.wfile.write(ADAPTER)
        self.close_connection = broken

    def do_HEAD(self) -> None:
        self.send_response(200)
        narrow = sum(taken) if "/narrow/" in self.path else 10
        self.send_header("Upload-Offset", str(SIZE_BYTES if "/done/" in self.path else narrow))
        self.end_headers()

    def do_PATCH(self) -> None:
        size_bytes = int(self.headers["Content-Length"])
        self.rfile.read(size_bytes)
        if "/nothing/" in self.path or ("/narrow/" in self.path and size_bytes > MOST_BODY_BYTES):
            refused.append(size_bytes)
            self.send_error(413)
            return
        taken.append(size_bytes)
        self.send_response(204)
        self.send_header("Upload-Offset", str(int(self.headers["Upload-Offset"]) + size_bytes))
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()
        thread.join()


@pytest.fixture
def transport(server: str, tmp_path: Path) -> Iterator[Transport]:
    connection = Transport(server, "token", tmp_path / "link.json")
    yield connection
    connection.close()


def test_a_download_and_an_upload_are_measured_and_remembered(transport: Transport, tmp_path: Path) -> None:
    transport.download(1, 4, tmp_path / "file", most_bytes=MOST_BYTES)
    assert transport.link.download_bytes_s is not None
    assert transport.link.upload_bytes_s is None
    transport.upload("work", tmp_path / "file")
    assert transport.link.upload_bytes_s is not None
    assert transport.link.upload_bytes_s > 0
    assert Transport(transport.url, "token", tmp_path / "link.json").link == transport.link


def test_what_was_there_already_is_no_transfer(transport: Transport, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE_BYTES))
    transport.upload("done", tmp_path / "file")
    assert transport.link == LinkSpeed()
    assert not (tmp_path / "link.json").exists()


def test_a_transfer_that_broke_off_is_not_counted(transport: Transport, tmp_path: Path) -> None:
    with pytest.raises(Unreachable):
        transport.download(9, 4, tmp_path / "file", most_bytes=MOST_BYTES)
    assert transport.link == LinkSpeed()


def test_the_date_of_the_answer_is_kept(transport: Transport, tmp_path: Path) -> None:
    assert transport.server_date is None
    (tmp_path / "file").write_bytes(bytes(SIZE_BYTES))
    transport.upload("done", tmp_path / "file")
    assert str(transport.server_date).endswith("GMT")


def test_pieces_of_an_upload_grow_as_long_as_they_get_through(transport: Transport, tmp_path: Path) -> None:
    """A proxy takes no body above 1 MiB: one attempt finds that out, and no later one tries it again."""
    (tmp_path / "file").write_bytes(bytes(6 << 20))
    taken.clear()
    refused.clear()
    transport.upload("narrow", tmp_path / "file")
    assert len(refused) == 1
    assert sum(taken) == 6 << 20
    assert taken[:3] == [256 << 10, 512 << 10, 1 << 20]
    assert max(taken) == 1 << 20
    transport.upload("wide", tmp_path / "file")
    assert len(refused) == 1
    assert max(taken) == 1 << 20


def test_a_proxy_that_takes_no_body_at_all_is_given_up(transport: Transport, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    refused.clear()
    with pytest.raises(Unreachable, match="takes no body of that size; its host may raise the limit"):
        transport.upload("nothing", tmp_path / "file")
    assert refused == [256 << 10, 128 << 10, 64 << 10]
