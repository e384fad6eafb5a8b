"""One device's connection to its coordinator: records and files over HTTP, each call one attempt.

Nothing here waits and tries again by itself: an attempt that reaches nobody raises Unreachable, and the agent
decides when the next one is due. What is worth keeping of a broken transfer is kept, so that the next attempt
continues at the right byte.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx

from edge_sdk.connection import answers
from edge_sdk.connection.answers import PLAIN, Patience
from edge_sdk.connection.link_speed import LinkSpeed, load_link, save_link
from edge_sdk.connection.partial_download import Part
from edge_sdk.connection.refusals import BODY_TOO_LARGE, error_of
from edge_sdk.connection.trust import Trust, explained
from edge_sdk.core import messages
from edge_sdk.core.adapter_file.dtypes import WireDtype
from edge_sdk.core.addresses import is_local
from edge_sdk.core.errors import InputError, OffsetConflict, OurFault, ProtocolError, Unreachable
from edge_sdk.core.messages import (
    Ask,
    Assignment,
    Federation,
    Heartbeat,
    HeartbeatReply,
    JoinReply,
    JoinRequest,
    NewCredential,
    Newest,
    NotNow,
    Status,
    Update,
    UpdateReply,
)
from edge_sdk.core.records import decode, encode

Record = TypeVar("Record")
TIMEOUT = httpx.Timeout(60.0, connect=10.0)  # without a byte, not for a whole transfer
BEAT_TIMEOUT = httpx.Timeout(10.0)  # training may wait for the answer
CHUNK_BYTES = 64 << 10  # a stop is heard between two of them
UPLOAD_TRIES = 3  # what a cut connection had sent may arrive just after the offset was asked for
# One request of an upload should take about PIECE_S: an answer that is due for longer than a time-out is
# taken for a dead link, and a proxy may take only small bodies.
PIECE_S = 10.0
SLOW_BYTES_S = 1024  # a link that sends less than this for long is taken for dead
LEAST_PIECE_BYTES, PIECE_BYTES, MOST_PIECE_BYTES = 64 << 10, 256 << 10, 16 << 20
MOST_PAGES = 1000  # of a status
INTRODUCTIONS = (Federation, JoinReply)  # whose mistakes a person must mend; all others pass


class TransferStopped(Exception):
    """The caller said so in the middle of a file; the next attempt goes on from there. Not an error."""


class Transport:
    """Calls of one device. `token` is its credential, or the join token before it has one.

    `link` is the measured throughput; `link_file` keeps it for the next start. `server_date` is the Date
    header of the last answer. Nothing is sent to anybody but those whom `trust` allows.

    Raises:
        InputError: the address or the token cannot be one, or is not to be trusted; nothing was sent.
    """

    def __init__(
        self, url: str, token: str, link_file: Path | None = None, trust: Trust | None = None
    ) -> None:
        _require_address(url)
        trust = trust or Trust()
        trust.require(url)
        if not (token.isascii() and token.isprintable() and token.strip() == token != ""):
            raise InputError("the token is not one: it must be printable ASCII without spaces around it")
        self.url, self.trust = url.rstrip("/"), trust
        self._tls = trust.context(url)
        self._headers = {"Authorization": f"Bearer {token}", **PLAIN}
        self._link_file = link_file
        self.link = load_link(link_file) if link_file else LinkSpeed()
        self.server_date: str | None = None
        self._most_piece_bytes = MOST_PIECE_BYTES
        self._http = self._client()

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def _client(self) -> httpx.Client:
        # What is on this machine is asked without a proxy, which would be another one.
        return httpx.Client(
            base_url=self.url,
            timeout=TIMEOUT,
            headers=self._headers,
            verify=self._tls,
            trust_env=not is_local(httpx.URL(self.url).host),
        )

    def federation(self) -> Federation:
        """What there is to take part in."""
        return self._record(Federation, self._send("GET", messages.FEDERATION))

    def join(self, request: JoinRequest) -> JoinReply:
        """Enrol with the join token."""
        return self._record(JoinReply, self._send("POST", messages.JOIN, record=request))

    def ask(self, ask: Ask) -> Assignment | NotNow:
        """Ask for work."""
        response = self._send("POST", messages.ASSIGNMENTS, record=ask, accept=(503,))
        if response.status_code == 503:
            return self._record(NotNow, response)
        return self._record(Assignment, response)

    def heartbeat(self, assignment: str, beat: Heartbeat) -> HeartbeatReply:
        """Report progress."""
        route = messages.HEARTBEAT.format(id=assignment)
        return self._record(HeartbeatReply, self._send("POST", route, record=beat, timeout=BEAT_TIMEOUT))

    def newest(self) -> Newest:
        """Which version there is by now."""
        return self._record(Newest, self._send("GET", messages.NEWEST))

    def renew(self) -> NewCredential:
        """Ask for another credential; the present one holds until that one is used."""
        return self._record(NewCredential, self._send("POST", messages.CREDENTIAL))

    def leave(self) -> None:
        """Give the membership back."""
        self._send("POST", messages.LEAVE)

    def status(self) -> Status:
        """The federation at a glance, with all its devices; as many requests as they have pages.

        Raises:
            Unreachable: there are more pages than anybody wants to read.
        """
        status = self.glance()
        if status.pages > MOST_PAGES:
            raise Unreachable(f"{self.url} has a status of {status.pages} pages; is it a coordinator?")
        devices = {device.id: device for device in status.devices}
        for page in range(1, status.pages):
            devices |= {device.id: device for device in self.glance(page).devices}
        return replace(status, devices=tuple(devices.values()), pages=1)

    def glance(self, page: int = 0) -> Status:
        """One page of the status: `page` says which of its devices, all else is the same in each."""
        params = {"page": page} if page else None
        return self._record(Status, self._send("GET", messages.STATUS, params=params))

    def upload(self, assignment: str, path: Path, stopping: Callable[[], bool] | None = None) -> None:
        """Send what the coordinator does not have yet of the file, in pieces that are each acknowledged.

        However long the whole takes, an answer is due after every piece; what a broken one has left behind
        counts.

        Raises:
            TransferStopped: `stopping`, asked between chunks, said so.
        """
        route, size_bytes = messages.UPLOAD.format(id=assignment), path.stat().st_size
        first = offset = self._stored_bytes(route)
        began, conflicts = time.monotonic(), 0
        piece_bytes = min(PIECE_BYTES, self._most_piece_bytes)
        while offset < size_bytes:
            piece = _Piece(path, offset, min(piece_bytes, size_bytes - offset))
            piece_began = time.monotonic()
            try:
                offset = self._append(route, piece, stopping)
            except (Unreachable, OurFault) as error:
                # A proxy may take no body of that size: this upload goes on, and the next begins, below it.
                said_so = BODY_TOO_LARGE in error.details
                least_bytes = LEAST_PIECE_BYTES if said_so else PIECE_BYTES
                self._most_piece_bytes = max(least_bytes, piece.size_bytes // 2)
                if not said_so or piece.size_bytes <= LEAST_PIECE_BYTES:
                    raise
            except OffsetConflict:
                conflicts += 1
                if conflicts == UPLOAD_TRIES:
                    raise Unreachable(f"the upload met another sender {conflicts} times") from None
                offset = self._stored_bytes(route)
            piece_bytes = _next_piece_bytes(piece_bytes, time.monotonic() - piece_began)
            piece_bytes = min(piece_bytes, self._most_piece_bytes)
        if size_bytes > first:
            self._measured(self.link.with_upload(size_bytes - first, time.monotonic() - began))

    def _stored_bytes(self, route: str) -> int:
        """How much of an upload the coordinator has."""
        return self._offset_in(self._send("HEAD", route))

    def _append(self, route: str, piece: _Piece, stopping: Callable[[], bool] | None) -> int:
        """Send one piece; where the stored bytes end after it."""
        headers = {
            messages.UPLOAD_OFFSET: str(piece.offset),
            "Content-Type": messages.OFFSET_CONTENT_TYPE,
            "Content-Length": str(piece.size_bytes),
        }
        response = self._send(
            "PATCH", route, content=piece.chunks(stopping), headers=headers, sends_bytes=piece.size_bytes
        )
        end = self._offset_in(response)
        if response.status_code != 204 or end != piece.offset + piece.size_bytes:
            raise Unreachable(f"{self.url} does not take an upload as a coordinator does; check the address")
        return end

    def _offset_in(self, response: httpx.Response) -> int:
        text = response.headers.get(messages.UPLOAD_OFFSET, "")
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise Unreachable(
                f"{self.url}: {messages.UPLOAD_OFFSET} {text[:40]!r} is not a number of bytes; "
                "is it a coordinator?"
            )
        return int(text)

    def deliver(self, assignment: str, update: Update) -> UpdateReply:
        """Say what was uploaded. Safe to repeat: the same update counts once."""
        route = messages.UPDATE.format(id=assignment)
        return self._record(UpdateReply, self._send("POST", route, record=update))

    def download(
        self,
        version: int,
        rank: int,
        path: Path,
        stopping: Callable[[], bool] | None = None,
        dtype: WireDtype = "float32",
        *,
        most_bytes: int,
    ) -> None:
        """Fetch the adapter of a version at a rank; a broken download continues where it stopped.

        Raises:
            Unreachable: it broke off, or came damaged or with more than `most_bytes` and was thrown away; the
                next attempt may do.
            Unwritable: the disk is full.
            TransferStopped: `stopping`, asked between chunks, said so.
        """
        part = Part(path, most_bytes)
        place = messages.ADAPTER if dtype == "float32" else messages.ADAPTER_IN
        route = place.format(version=version, rank=rank, dtype=dtype)
        began, received_bytes = time.monotonic(), 0
        with (
            self._patiently(answers.RECORD_S) as patience,
            self._http.stream("GET", route, headers=part.headers()) as response,
        ):
            if response.status_code == 416:
                part.discard()
                raise Unreachable("the partial download did not fit; it starts over")
            if response.status_code not in (200, 206):
                raise error_of(answers.whole(response, answers.MOST_RECORD_BYTES))
            for size_bytes in answers.in_time(part.receive(response)):
                patience.again()
                received_bytes += size_bytes
                if not part.is_whole:  # of which there would be nothing left to ask for
                    _heed(stopping)
        self._measured(self.link.with_download(received_bytes, time.monotonic() - began))
        part.finish()

    def _send(
        self,
        method: str,
        route: str,
        accept: tuple[int, ...] = (),
        record: Any = None,
        most_bytes: int = answers.MOST_RECORD_BYTES,
        sends_bytes: int = 0,
        **arguments: Any,
    ) -> httpx.Response:
        """One attempt; a refusal comes back as the error that its problem document names.

        An answer has at most `most_bytes`; the request takes longer by what `sends_bytes` may take.
        """
        if record is not None:
            arguments |= {"content": encode(record), "headers": {"Content-Type": "application/json"}}
        with (
            self._patiently(answers.RECORD_S + sends_bytes / SLOW_BYTES_S),
            self._http.stream(method, route, **arguments) as stream,
        ):
            response = answers.whole(stream, most_bytes)
        self.server_date = response.headers.get("Date")
        if not response.is_success and not (response.status_code in accept and _is_record(response)):
            raise error_of(response)
        return response

    @contextlib.contextmanager
    def _patiently(self, seconds: float) -> Iterator[Patience]:
        """While inside, a call that takes longer in all is cut; what goes wrong with it is Unreachable."""
        patience = Patience(seconds, self._cut)
        try:
            with patience:
                yield patience
        except httpx.RequestError as error:
            if not patience.lost:
                raise self._unreachable(error) from error
            raise Unreachable(f"{self.url} did not come to an end within {seconds:.0f} s") from error
        except (RuntimeError, ValueError, OSError) as error:  # of connections that were cut
            if not patience.lost:
                raise
            raise Unreachable(f"{self.url} did not come to an end within {seconds:.0f} s") from error

    def _cut(self) -> None:
        """Hang up in the middle of whatever is under way, from another thread."""
        cut, self._http = self._http, self._client()
        cut.close()

    def _measured(self, link: LinkSpeed) -> None:
        """Take over a newer measurement of the link."""
        if link != self.link and self._link_file:
            save_link(self._link_file, link)
        self.link = link

    def _record(self, kind: type[Record], response: httpx.Response) -> Record:
        try:
            return decode(kind, response.content)
        except ValueError as error:
            raise Unreachable(f"{self.url} does not answer like a coordinator; check the address") from error
        except ProtocolError as error:
            if kind in INTRODUCTIONS:
                raise ProtocolError(f"{self.url}: {error}") from error
            raise Unreachable(f"{self.url} does not answer like a coordinator: {error}") from error

    def _unreachable(self, error: httpx.RequestError) -> Unreachable:
        if (found := explained(self.url, error)) is not None:
            return found
        reason = str(error) or type(error).__name__
        hung_up = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError)
        hint = "; one that speaks TLS has an https:// address" if hung_up and self.url[:5] == "http:" else ""
        return Unreachable(
            f"no coordinator answers at {self.url} ({reason}); check the address and that it runs{hint}"
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
        raise InputError(f"{url!r} is no address of a coordinator; write it like https://192.168.1.20:8765")


def _heed(stopping: Callable[[], bool] | None) -> None:
    if stopping is not None and stopping():
        raise TransferStopped


@dataclass(frozen=True)
class _Piece:
    """A stretch of a file, sent in one request."""

    path: Path
    offset: int
    size_bytes: int

    def chunks(self, stopping: Callable[[], bool] | None) -> Iterator[bytes]:
        """Its bytes."""
        left = self.size_bytes
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while left and (chunk := file.read(min(CHUNK_BYTES, left))):
                _heed(stopping)
                left -= len(chunk)
                yield chunk


def _next_piece_bytes(piece_bytes: int, took_s: float) -> int:
    """The size of the next piece: larger on a quick link, smaller on a slow one."""
    if took_s < PIECE_S / 2:
        return min(MOST_PIECE_BYTES, 2 * piece_bytes)
    return max(LEAST_PIECE_BYTES, piece_bytes // 2) if took_s > 2 * PIECE_S else piece_bytes


def _is_record(response: httpx.Response) -> bool:
    return str(response.headers.get("Content-Type", "")).startswith("application/json")
