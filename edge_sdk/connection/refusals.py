"""What an answer means that is no success: a refusal of the coordinator, or somebody else on the way.

Only a problem document of a kind that this side knows is the coordinator's word. Everything else comes from a
proxy, a portal or a broken link, and says nothing about the work: it is tried again later.
"""

from __future__ import annotations

import json

import httpx

from edge_sdk.core.errors import (
    BadUpdates,
    EdgeError,
    InputError,
    NotFound,
    OurFault,
    OutOfMemory,
    TheirFault,
    Unauthorised,
    Unreachable,
    Unwritable,
    WorkerDied,
    from_problem,
)
from edge_sdk.core.messages import PROBLEM_CONTENT_TYPE
from edge_sdk.system.backoff import WAIT, asked_wait_s, within_reason

PASSING = (408, 421, 425, 429)  # and all from 500 on: the same request may succeed later
BODY_TOO_LARGE = "body_too_large"  # among an error's details: a proxy on the way takes no such body
# What only this side can find: of its disk, its memory, its training and its owner's words.
OWN = (Unwritable, WorkerDied, OutOfMemory, Unreachable, InputError, BadUpdates)
BODYLESS: dict[int, type[EdgeError]] = {401: Unauthorised, 404: NotFound}  # what HEAD is refused with


def error_of(response: httpx.Response) -> EdgeError:
    """The error behind an answer whose body was read; it carries the wait that the answer asks for."""
    error = _error(response)
    said = error.details.pop(WAIT, None)
    wait_s = asked_wait_s(response.headers)
    if wait_s is None and type(said) in (int, float):
        wait_s = within_reason(said)
    if wait_s is not None:
        error.details[WAIT] = wait_s
    return error


def _error(response: httpx.Response) -> EdgeError:
    status, passing = response.status_code, response.status_code >= 500 or response.status_code in PASSING
    if (problem := _problem(response)) is not None:
        if passing and isinstance(problem, TheirFault):
            return OurFault(str(problem))
        if type(problem) is not TheirFault:
            return problem
    text = json.dumps(response.content[:80].decode("utf-8", "replace"))  # whatever charset it claims
    if passing:
        return OurFault(f"the server answered {status}: {text}")
    if status == 413:
        reason = f"a proxy before {response.request.url} takes no body of that size"
        return Unreachable(f"{reason}; its host may raise the limit", **{BODY_TOO_LARGE: True})
    if response.is_redirect:
        to = response.headers.get("Location", "")[:80]
        return Unreachable(f"{response.request.url} sends on to {to!r}; give the coordinator's own address")
    return Unreachable(f"{response.request.url} answered {status}: {text}; is it a coordinator?")


def _problem(response: httpx.Response) -> EdgeError | None:
    """What a problem document reports. The answer to HEAD has none, so that type and status have to do."""
    if response.request.method == "HEAD":
        is_one = response.headers.get("Content-Type", "").startswith(PROBLEM_CONTENT_TYPE)
        kind = BODYLESS.get(response.status_code) if is_one else None
        return kind(f"{response.request.url} answered {response.status_code}") if kind else None
    try:
        document = response.json()
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or "title" not in document:
        return None
    problem = from_problem(document)
    return None if isinstance(problem, OWN) else problem
