"""Every route of the wire as data: who may call it, what goes in and what comes back.

The coordinator registers its handlers from ROUTES, and describes itself by it in OpenAPI. Any answer that is
not listed with its status is a problem document as well (RFC 9457; `Problem`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from edge_sdk.core import messages
from edge_sdk.core.adapter_file.dtypes import WireDtype
from edge_sdk.core.errors import (
    AdapterError,
    BaseMismatch,
    Busy,
    DiskFull,
    EdgeError,
    FederationFull,
    NotFound,
    OffsetConflict,
    ProtocolError,
    StaleUpdate,
    TooLarge,
    TooOften,
    Unauthorised,
    UploadLost,
)
from edge_sdk.core.ranges import ByteCount, Count, Id, Rank, Version

Caller = Literal["join token", "credential", "either", "host", "anyone"]
"""Whose secret a request carries, as `Authorization: Bearer …`; anyone needs none."""

PLACEHOLDERS: dict[str, Any] = {"id": Id, "version": Version, "rank": Rank, "dtype": WireDtype}
"""What may stand in a path, with its type and range."""


@dataclass(frozen=True)
class Problem:
    """Why a request was refused, and what to do (RFC 9457). Some kinds have further members."""

    title: str  # constant for its kind: the titles of `edge_sdk.core.errors`
    status: int
    detail: str


@dataclass(frozen=True)
class Bytes:
    """A body that is no record."""

    media_type: str


@dataclass(frozen=True)
class Header:
    """A header that means something to this protocol, or is worth sending."""

    name: str
    kind: Any  # a type, with its range
    meaning: str
    required: bool = False


@dataclass(frozen=True)
class Query:
    """What may be asked for behind the question mark of an address."""

    name: str
    kind: Any  # a type, with its range
    meaning: str


@dataclass(frozen=True)
class Answer:
    """What comes back with a status: a record, bytes, or nothing."""

    status: int
    content: type | Bytes | None
    meaning: str
    headers: tuple[Header, ...] = ()


@dataclass(frozen=True)
class Route:
    """One method on one path.

    `refusals`: the errors that a caller must expect; others are possible, TooOften from any route that wants
    a credential.
    """

    name: str
    method: str
    path: str
    summary: str
    caller: Caller
    answers: tuple[Answer, ...]
    body: type | Bytes | None = None
    headers: tuple[Header, ...] = ()
    queries: tuple[Query, ...] = ()
    refusals: tuple[type[EdgeError], ...] = ()


OFFSET = Header(
    messages.UPLOAD_OFFSET, ByteCount, "Bytes of the upload that are stored: where the next ones go."
)
OFFSET_OF_BODY = Header(
    messages.UPLOAD_OFFSET, ByteCount, "Where the body begins; what is stored so far.", True
)
RETRY_AFTER = Header("Retry-After", Count, "Seconds to wait before asking again.")
PAGE = Query("page", Count, "Which page of the devices, counted from 0; the first if none is named.")
RANGE = Header("Range", str, "The part of the file that is wanted, so a broken download goes on.")
PAGE = Query("page", Count, "Which page of the devices, counted from 0; the first if none is named.")
CONTENT_RANGE = Header("Content-Range", str, "Which part of the file this is.")
ETAG = Header("ETag", str, "Names the content of the file.")
SAFETENSORS, JSON = Bytes("application/octet-stream"), Bytes("application/json")

FILE = (
    Answer(200, SAFETENSORS, "The whole file; it never changes.", (ETAG,)),
    Answer(206, SAFETENSORS, "The part that was asked for.", (ETAG, CONTENT_RANGE)),
    Answer(304, None, "It is the one that If-None-Match names.", (ETAG,)),
    Answer(412, None, "It is not the one that If-Match names."),
    Answer(416, None, "The file has no such part.", (CONTENT_RANGE,)),
)
OF_A_BODY = (ProtocolError, TooLarge)

ROUTES = (
    Route(
        "join",
        "POST",
        messages.JOIN,
        "Enrol a device; its credential is shown this once.",
        caller="join token",
        body=messages.JoinRequest,
        answers=(Answer(201, messages.JoinReply, "A new member."),),
        refusals=(Unauthorised, BaseMismatch, FederationFull, TooOften, *OF_A_BODY, DiskFull),
    ),
    Route(
        "federation",
        "GET",
        messages.FEDERATION,
        "What there is to take part in.",
        caller="either",
        answers=(Answer(200, messages.Federation, "The same for the life of a federation."),),
        refusals=(Unauthorised,),
    ),
    Route(
        "ask",
        "POST",
        messages.ASSIGNMENTS,
        "Ask for work. A device that has an assignment in hand is given that one again.",
        caller="credential",
        body=messages.Ask,
        answers=(
            Answer(200, messages.Assignment, "Train this."),
            Answer(503, messages.NotNow, "No work at present.", (RETRY_AFTER,)),
        ),
        refusals=(Unauthorised, *OF_A_BODY),
    ),
    Route(
        "heartbeat",
        "POST",
        messages.HEARTBEAT,
        "Report progress.",
        caller="credential",
        body=messages.Heartbeat,
        answers=(Answer(200, messages.HeartbeatReply, "Whether to go on."),),
        refusals=(Unauthorised, NotFound, *OF_A_BODY),
    ),
    Route(
        "upload_offset",
        "HEAD",
        messages.UPLOAD,
        "How much of the finished adapter is stored; all of it, once the update is acknowledged.",
        caller="credential",
        answers=(Answer(200, None, "Go on at this byte.", (OFFSET,)),),
        refusals=(Unauthorised, NotFound, Busy),
    ),
    Route(
        "upload",
        "PATCH",
        messages.UPLOAD,
        "Append to the finished adapter. What came before a cut stays.",
        caller="credential",
        body=Bytes(messages.OFFSET_CONTENT_TYPE),
        headers=(OFFSET_OF_BODY,),
        answers=(Answer(204, None, "Stored.", (OFFSET,)),),
        refusals=(Unauthorised, NotFound, OffsetConflict, *OF_A_BODY, Busy, DiskFull),
    ),
    Route(
        "deliver",
        "POST",
        messages.UPDATE,
        "Say what was uploaded. The same update twice counts once.",
        caller="credential",
        body=messages.Update,
        answers=(Answer(202, messages.UpdateReply, "On disk for good, and counted once."),),
        refusals=(Unauthorised, NotFound, UploadLost, StaleUpdate, AdapterError, *OF_A_BODY, DiskFull),
    ),
    Route(
        "adapter",
        "GET",
        messages.ADAPTER,
        "The global adapter of a version at a rank, in float32: a file that PEFT reads.",
        caller="credential",
        headers=(RANGE,),
        answers=FILE,
        refusals=(Unauthorised, NotFound),
    ),
    Route(
        "adapter_in",
        "GET",
        messages.ADAPTER_IN,
        "The same in a dtype of the wire.",
        caller="credential",
        headers=(RANGE,),
        answers=FILE,
        refusals=(Unauthorised, NotFound),
    ),
    Route(
        "adapter_config",
        "GET",
        messages.ADAPTER_CONFIG,
        "The configuration by which PEFT reads that file.",
        caller="credential",
        answers=(Answer(200, JSON, "An adapter_config.json."),),
        refusals=(Unauthorised, NotFound),
    ),
    Route(
        "newest",
        "GET",
        messages.NEWEST,
        "Which version there is by now.",
        caller="credential",
        answers=(Answer(200, messages.Newest, "The newest."),),
        refusals=(Unauthorised,),
    ),
    Route(
        "renew",
        "POST",
        messages.CREDENTIAL,
        "Another credential; the one that asks for it holds until the new one is used.",
        caller="credential",
        answers=(Answer(201, messages.NewCredential, "Shown this once."),),
        refusals=(Unauthorised,),
    ),
    Route(
        "leave",
        "POST",
        messages.LEAVE,
        "Give the membership back. What the device handed in until now still counts.",
        caller="credential",
        answers=(Answer(204, None, "The credential lets nobody in any more."),),
        refusals=(Unauthorised,),
    ),
    Route(
        "status",
        "GET",
        messages.STATUS,
        "The federation at a glance, for its host.",
        caller="host",
        queries=(PAGE,),
        answers=(Answer(200, messages.Status, "At most a moment old."),),
        refusals=(Unauthorised, NotFound),
    ),
    Route(
        "openapi",
        "GET",
        messages.OPENAPI,
        "This document.",
        caller="anyone",
        answers=(Answer(200, JSON, "OpenAPI 3.1."),),
    ),
)
