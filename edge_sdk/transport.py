"""One device's connection to its coordinator: records and files over HTTP, each call one attempt.

Nothing here waits and tries again by itself: an attempt that reaches nobody raises Unreachable, and the agent
decides when the next one is due. What is worth keeping of a broken transfer is kept, so that the next attempt
continues at the right byte.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx

from edge_sdk.core import messages
from edge_sdk.core.errors import (
    EdgeError,
    InputError,
    NotFound,
    OffsetConflict,
    OurFault,
    ProtocolError,
    Unauthorised,
    Unreachable,
    from_problem,
)
from edge_sdk.core.messages import (
    Ask,
    Assignment,
    Federation,
    Heartbeat,
    HeartbeatReply,
    JoinReply,
    JoinRequest,
    NotNow,
    Status,
    Update,
    UpdateReply,
)
from edge_sdk.core.records import from_json, to_json
from edge_sdk.core.wire_dtype import WireDtype
from edge_sdk.link import Link, load_link, save_link

Record = TypeVar("Record")
TIMEOUT = httpx.Timeout(60.0, connect=10.0)
CHUNK_BYTES = 64 << 10  # a stop is heard between two of them
UPLOAD_TRIES = 3  # what a cut connection had sent may arrive just after the offset was asked for


class TransferStopped(Exception):
    """The caller said so in the middle of a file; the next attempt goes on from there. Not an error."""


class Transport:
    """Calls of one device. `token` is its credential, or the join token before it has one.

    `link` is the measured throughput; `link_file` keeps it for the next start. `server_date` is the Date
    header of the last answer.

    Raises:
        InputError: the address or the token cannot be one; nothing was sent.
    """

    def __init__(self, url: str, token: str, link_file: Path | None = None) -> None:
        _require_address(url)
        if not (token.isascii() and token.isprintable() and token.strip() == token != ""):
            raise InputError("the token is not one: it must be printable ASCII without spaces around it")
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"}
        self._link_file = link_file
        self.link = load_link(link_file) if link_file else Link()
        self.server_date: str | None = None
        self._http = httpx.Client(base_url=self.url, timeout=TIMEOUT, headers=self._headers)

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def federation(self) -> Federation:
        """What there is to take part in."""
        return self._record(Federation, self._send("GET", messages.FEDERATION))

    def join(self, request: JoinRequest) -> JoinReply:
        """Enrol with the join token."""
        return self._record(JoinReply, self._send("POST", messages.JOIN, json=to_json(request)))

    def ask(self, ask: Ask) -> Assignment | NotNow:
        """Ask for work."""
        response = self._send("POST", messages.ASSIGNMENTS, json=to_json(ask), accept=(503,))
        if response.status_code == 503:
            return self._record(NotNow, response)
        return self._record(Assignment, response)

    def heartbeat(self, assignment: str, beat: Heartbeat) -> HeartbeatReply:
        """Report progress."""
        route = messages.HEARTBEAT.format(id=assignment)
        return self._record(HeartbeatReply, self._send("POST", route, json=to_json(beat)))

    def status(self) -> Status:
        """The federation at a glance."""
        return self._record(Status, self._send("GET", messages.STATUS))

    def upload(self, assignment: str, path: Path, stopping: Callable[[], bool] | None = None) -> None:
        """Send what the coordinator does not have yet of the file.

        Raises:
            TransferStopped: `stopping`, asked between chunks, said so.
        """
        for _ in range(UPLOAD_TRIES):
            try:
                self._upload_rest(messages.UPLOAD.format(id=assignment), path, stopping)
            except OffsetConflict:
                continue
            return
        raise Unreachable(f"the upload met another sender {UPLOAD_TRIES} times; it goes on later")

    def _upload_rest(self, route: str, path: Path, stopping: Callable[[], bool] | None) -> None:
        text = self._send("HEAD", route).headers.get(messages.UPLOAD_OFFSET, "")
        if not text.isdigit():
            raise ProtocolError(f"{messages.UPLOAD_OFFSET}: {text[:40]!r} is not a number of bytes")
        offset = int(text)
        rest_bytes = path.stat().st_size - offset
        if rest_bytes <= 0:
            return
        headers = {messages.UPLOAD_OFFSET: str(offset), "Content-Type": messages.OFFSET_CONTENT_TYPE}
        began = time.monotonic()
        self._send("PATCH", route, content=_bytes_from(path, offset, stopping), headers=headers)
        self._measured(self.link.with_upload(rest_bytes, time.monotonic() - began))

    def deliver(self, assignment: str, update: Update) -> UpdateReply:
        """Say what was uploaded. Safe to repeat: the same update counts once."""
        route = messages.UPDATE.format(id=assignment)
        return self._record(UpdateReply, self._send("POST", route, json=to_json(update)))

    def download(
        self,
        version: int,
        rank: int,
        path: Path,
        stopping: Callable[[], bool] | None = None,
        dtype: WireDtype = "float32",
    ) -> None:
        """Fetch the adapter of a version at a rank; a broken download continues where it stopped.

        Raises:
            TransferStopped: `stopping`, asked between chunks, said so.
        """
        part = path.with_name(path.name + ".part")
        have = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        place = messages.ADAPTER if dtype == "float32" else messages.ADAPTER_IN
        route = place.format(version=version, rank=rank, dtype=dtype)
        began, received_bytes = time.monotonic(), 0
        try:
            with self._http.stream("GET", route, headers=headers) as response:
                if response.status_code == 416:  # the part is whole or not ours: start over
                    part.unlink()
                    raise Unreachable("the partial download did not fit; it starts over")
                if response.is_error:
                    response.read()
                    raise _error_of(response)
                with part.open("ab" if response.status_code == 206 else "wb") as file:
                    for chunk in response.iter_bytes():  # as they come in
                        received_bytes += file.write(chunk)
                        _heed(stopping)
        except httpx.RequestError as error:
            raise self._unreachable(error) from error
        self._measured(self.link.with_download(received_bytes, time.monotonic() - began))
        part.replace(path)

    def _send(
        self, method: str, route: str, accept: tuple[int, ...] = (), **arguments: Any
    ) -> httpx.Response:
        """One attempt; a refusal comes back as the error that its problem document names."""
        try:
            response = self._http.request(method, route, **arguments)
        except httpx.RequestError as error:
            raise self._unreachable(error) from error
        self.server_date = response.headers.get("Date")
        if response.is_error and not (response.status_code in accept and _is_record(response)):
            raise _error_of(response)
        return response

    def _measured(self, link: Link) -> None:
        """Take over a newer measurement of the link."""
        if link != self.link and self._link_file:
            save_link(self._link_file, link)
        self.link = link

    def _record(self, kind: type[Record], response: httpx.Response) -> Record:
        try:
            value = response.json()
        except ValueError as error:
            raise Unreachable(f"{self.url} does not answer like a coordinator; check the address") from error
        try:
            return from_json(kind, value)
        except ProtocolError as error:
            raise ProtocolError(f"{self.url}: {error}") from error

    def _unreachable(self, error: httpx.RequestError) -> Unreachable:
        reason = str(error) or type(error).__name__
        return Unreachable(
            f"no coordinator answers at {self.url} ({reason}); check the address and that it runs"
        )


def _require_address(url: str) -> None:
    """Raise InputError unless `url` has the form of an HTTP address."""
    try:
        parsed = httpx.URL(url)
        good = parsed.scheme in ("http", "https") and bool(parsed.host) and (parsed.port or 0) < 65536
        good = good and not any(character.isspace() for character in url)
    except httpx.InvalidURL:
        good = False
    if not good:
        raise InputError(f"{url!r} is no address of a coordinator; write it like http://192.168.1.20:8765")


def _heed(stopping: Callable[[], bool] | None) -> None:
    if stopping is not None and stopping():
        raise TransferStopped


def _bytes_from(path: Path, offset: int, stopping: Callable[[], bool] | None) -> Iterator[bytes]:
    """A file from `offset` on, in pieces."""
    with path.open("rb") as file:
        file.seek(offset)
        while chunk := file.read(CHUNK_BYTES):
            _heed(stopping)
            yield chunk


def _is_record(response: httpx.Response) -> bool:
    return str(response.headers.get("Content-Type", "")).startswith("application/json")


def _error_of(response: httpx.Response) -> EdgeError:
    """The error behind a refusal. What is no problem document comes from a proxy or a stranger.

    The answer to HEAD has no body, so that its status has to do.
    """
    bodyless: dict[int, type[EdgeError]] = {401: Unauthorised, 404: NotFound}
    if response.request.method == "HEAD" and response.status_code in bodyless:
        return bodyless[response.status_code](f"{response.request.url} answered {response.status_code}")
    try:
        document = response.json()
    except ValueError:
        document = None
    if isinstance(document, dict) and "title" in document:
        return from_problem(document)
    text = json.dumps(response.text[:80])
    if response.status_code >= 500 or response.status_code in (408, 429):
        return OurFault(f"the server answered {response.status_code}: {text}")
    return ProtocolError(
        f"{response.request.url} answered {response.status_code}: {text}; is it a coordinator?"
    )
