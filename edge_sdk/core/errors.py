"""The error tree. Whose fault it is decides the branch; what to answer over HTTP sits on the class.

EdgeError
├── TheirFault                 the other side, the user or a file is wrong: say what and what to do
│   ├── InputError        400  a file, flag, setting or record that somebody typed (exit code 2)
│   ├── ProtocolError     400  a message that does not follow the wire format
│   │   └── UploadLost    409  the bytes of an upload are not what was announced; send them again
│   ├── Unauthorised      401  no credential, or a wrong one
│   ├── NotFound          404  no such assignment, version or file
│   ├── BaseMismatch      409  another base model than the federation's
│   ├── FederationFull    403  as many devices have joined as its host lets in
│   ├── StaleUpdate       409  trained from a version too old to merge; carries the current version
│   ├── OffsetConflict    409  an upload continued at the wrong byte; carries the right one
│   ├── TooLarge          413  a body or file over its cap
│   ├── WrongHost         421  meant for another host, or sent past the proxy that it should come by
│   └── AdapterError      422  an adapter whose modules, shapes, dtypes or values are wrong
├── OurFault
│   ├── InternalError     500  a bug, or a read-only or broken disk, on the answering side
│   ├── DiskFull          507  no room on the answering side's disk; the same request succeeds once there is
│   ├── Busy              503  more at a time than can be taken in; carries how long to wait
│   │   └── TooOften      429  more than one device or address may ask for; likewise
│   ├── Unwritable        507  a file of this device cannot be written: its disk is full, or read-only
│   ├── BadUpdates        500  acknowledged updates cannot be merged; names each, and what is wrong with it
│   └── WorkerDied        500  the process that trains ended on its own; carries the reason and the last step
├── Unreachable           503  nobody answered; try again later
│   └── WrongKey          503  somebody answers who is not the coordinator that is meant; nothing was sent
└── OutOfMemory           507  this machine's memory was not enough; a smaller setting may be
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_sdk.core.words import printable

MOST_DETAIL = 1000  # characters of what the other side says of an error


class EdgeError(Exception):
    """Base of every error raised on purpose by this project.

    `status` is the HTTP status that reports it, `title` the constant headline of its RFC 9457 problem
    document, and `details` the extra members of that document (JSON values only).
    """

    status = 500
    title = "error"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details: dict[str, Any] = details


class TheirFault(EdgeError):
    """The caller, the peer or a file is wrong; the message says what to do about it."""

    status = 400
    title = "bad request"


class InputError(TheirFault):
    """A file, flag or setting that a person gave is unusable. Command lines exit with code 2."""

    title = "bad input"


class ProtocolError(TheirFault):
    """A message does not follow the wire format; names the field."""

    title = "bad message"


class UploadLost(ProtocolError):
    """The bytes of an upload are missing or have another digest, and were dropped: send them from byte 0."""

    status = 409
    title = "upload lost"


class Unauthorised(TheirFault):
    """No credential, or one that is wrong or revoked."""

    status = 401
    title = "not authorised"


class NotFound(TheirFault):
    """No such assignment, version or file."""

    status = 404
    title = "not found"


class BaseMismatch(TheirFault):
    """The device's base model is not the federation's."""

    status = 409
    title = "wrong base model"


class FederationFull(TheirFault):
    """As many devices have joined as the host lets in. One that is a member already stays one."""

    status = 403
    title = "federation full"


class StaleUpdate(TheirFault):
    """The update started from a version too old to merge. `details["current_version"]` is the one to use."""

    status = 409
    title = "update too stale"


class OffsetConflict(TheirFault):
    """An upload chunk did not start where the stored bytes end. `details["offset"]` is the right place."""

    status = 409
    title = "wrong upload offset"


class TooLarge(TheirFault):
    """A body or file exceeds its cap."""

    status = 413
    title = "too large"


class WrongHost(TheirFault):
    """A request that is not meant for this coordinator, or did not come the way that its host wants."""

    status = 421
    title = "wrong host"


class AdapterError(TheirFault):
    """An adapter's modules, shapes, dtypes or values are wrong; names the module."""

    status = 422
    title = "bad adapter"


class OurFault(EdgeError):
    """The side that answers is broken; retrying later may help, changing the request will not."""

    title = "our fault"


class InternalError(OurFault):
    """A bug or a failing disk on the answering side."""

    title = "internal error"


class DiskFull(OurFault):
    """The answering side has no room to keep what it was sent. Its host must make some; nothing is lost."""

    status = 507
    title = "disk full"


class Busy(OurFault):
    """More comes at a time than the answering side takes in. `details["retry_after_s"]`: how long to wait."""

    status = 503
    title = "busy"


class TooOften(Busy):
    """One device, or one address, asks for more than its share. `details["retry_after_s"]`: as of Busy."""

    status = 429
    title = "too many requests"


class Unwritable(OurFault):
    """A file that must survive cannot be written. What it would replace is as it was; try again later."""

    status = 507
    title = "cannot write"


class BadUpdates(OurFault):
    """Updates that were acknowledged cannot be merged, because their files are not what they were.

    `details["reasons"]` says of each, by its id, what is wrong. The other updates still count.
    """

    title = "bad updates"

    @classmethod
    def of(cls, reasons: Mapping[str, str]) -> BadUpdates:
        """The error for these updates."""
        shown = "; ".join(f"update {update}: {reason}" for update, reason in reasons.items())
        return cls(shown, reasons=dict(reasons))

    @property
    def reasons(self) -> dict[str, str]:
        """Update -> what is wrong with it."""
        return dict(self.details["reasons"])


class WorkerDied(OurFault):
    """The process that trains ended on its own, or hung and was ended. The checkpoint is as it was.

    `details["step"]` is the last step that was reported, `details["reason"]` how the process ended.
    """

    title = "worker died"


class Unreachable(EdgeError):
    """Nobody answered at the other end."""

    status = 503
    title = "unreachable"


class WrongKey(Unreachable):
    """Whoever answers at the coordinator's address is somebody else. No request was sent, so no secret."""

    title = "wrong key"


class OutOfMemory(EdgeError):
    """The memory was not enough. The work goes on from its checkpoint at a smaller setting.

    `details`: `step`, the last one that was finished; `setting`, in words; `reason`, what the system said.
    """

    status = 507
    title = "out of memory"


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's message, cut to `most` characters; its class where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def one_line(error: BaseException) -> str:
    """All lines of a short message in one: the second often says what the first does not."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def subclasses(root: type[EdgeError]) -> list[type[EdgeError]]:
    """`root` and every class below it, parents first."""
    found = [root]
    for child in root.__subclasses__():
        found.extend(subclasses(child))
    return found


def from_problem(document: dict[str, Any]) -> EdgeError:
    """Rebuild the error that a problem document (RFC 9457) reports.

    An unknown title becomes TheirFault for 4xx statuses and InternalError otherwise.
    """
    status, detail = document.get("status"), document.get("detail")
    message = printable(detail, MOST_DETAIL) if isinstance(detail, str) else "no detail given"
    reserved = {"type", "title", "status", "detail", "instance"}
    details = {key: value for key, value in document.items() if key not in reserved}
    theirs = isinstance(status, int) and 400 <= status < 500
    kind: type[EdgeError] = TheirFault if theirs else InternalError
    kind = next((known for known in subclasses(EdgeError) if known.title == document.get("title")), kind)
    error = kind(message)
    error.details.update(details)  # a stranger's members may have any name, `self` too
    return error
