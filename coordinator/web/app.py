"""The aiohttp application: routes in, records out, every refusal an RFC 9457 problem document."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from coordinator.adapters.ladder import Rung
from coordinator.limits.networks import network_of
from coordinator.service.coordinator import Coordinator
from coordinator.web import openapi
from coordinator.web.addresses import ENDPOINT, client_address, only_if_meant
from coordinator.web.connections import at_work
from coordinator.web.endpoint import Endpoint
from coordinator.web.intake import Intake, receive
from edge_sdk.core import messages
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.adapter_file.dtypes import WIRE_DTYPES
from edge_sdk.core.errors import (
    Busy,
    EdgeError,
    InternalError,
    NotFound,
    OffsetConflict,
    OurFault,
    ProtocolError,
    StaleUpdate,
    TooLarge,
    TooOften,
    Unauthorised,
)
from edge_sdk.core.messages import Ask, Heartbeat, JoinRequest, NotNow, Update
from edge_sdk.core.records import decode, encode
from edge_sdk.core.routes import ROUTES
from edge_sdk.core.words import printable
from edge_sdk.system.terminal import logger

log = logger("coordinator")
COORDINATOR = web.AppKey("coordinator", Coordinator)
INTAKE = web.AppKey("intake", Intake)
Record = TypeVar("Record")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_RECORD_BYTES = 64 << 10  # a JSON record is a few hundred bytes; a profile is the largest
BODY_TIMEOUT_S = 30.0  # a JSON body that takes longer is a stalled or hostile sender
LATE_S = 1.0  # by which an address that floods gets its answers late
MAX_DETAIL = 4000  # characters of what was wrong with a request
# Of strangers, mostly. What else is refused belongs to a device, whose requests are counted anyway.
LATE_IF_OFTEN = (400, 401, 404, 405, 408, 413, 415, 421, 429)
ROUTINE = (StaleUpdate, OffsetConflict)
BROKE_OFF = "broke off"  # a word for the log
DEVICE = "device"  # whose credential a request had


def build_app(coordinator: Coordinator, endpoint: Endpoint | None = None) -> web.Application:
    """The application that serves one federation, at an endpoint or, without one, on this machine alone."""
    app = web.Application(middlewares=[problem_documents, only_if_meant], client_max_size=MAX_RECORD_BYTES)
    app[COORDINATOR], app[INTAKE] = coordinator, Intake()
    app[ENDPOINT] = endpoint or Endpoint()
    prefix = app[ENDPOINT].serving.path_prefix
    app.cleanup_ctx.append(_ticking)
    for route in ROUTES:
        add = app.router.add_get if route.method == "GET" else partial(app.router.add_route, route.method)
        add(prefix + route.path, HANDLERS[route.name])  # what answers GET answers HEAD too
    return app


async def _ticking(app: web.Application) -> AsyncIterator[None]:
    """Run the clock for as long as the server runs; on the way out let a merge finish."""
    coordinator = app[COORDINATOR]
    task = asyncio.create_task(coordinator.run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await coordinator.close()


@web.middleware
async def problem_documents(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error with a problem document that says what to do; note what has to be noted of it."""
    response = await _answer(request, handler)
    if response.status in LATE_IF_OFTEN or request.match_info.handler is description:
        await _hold_back_a_flood(request)
    return response


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What the handler answers, or what its error becomes."""
    try:
        with at_work(request):
            if request.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
                raise web.HTTPUnsupportedMediaType(reason="Content-Encoding: send the body as it is")
            return await handler(request)
    except EdgeError as error:
        return _refuse(request, error, error.status)
    except web.HTTPException as error:
        kind = NotFound if error.status == 404 else ProtocolError
        return _refuse(request, kind(f"{request.method} {request.path}: {error.reason}"), error.status)
    except TimeoutError:
        return _refuse(request, ProtocolError("the body stopped coming; send it again"), 408, BROKE_OFF)
    except (ConnectionError, web.RequestPayloadError):
        return _refuse(request, ProtocolError("the body broke off; send the rest of it"), 408, BROKE_OFF)
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return _problem(InternalError("the coordinator failed at this request; its log says why"))


async def _hold_back_a_flood(request: web.Request) -> None:
    """Wait a little where an address asks for much that does nobody any good: that limits what it can ask."""
    if request.app[COORDINATOR].allowances.is_flooding(network_of(client_address(request))):
        await asyncio.sleep(LATE_S)


def _refuse(request: web.Request, error: EdgeError, status: int, title: str = "") -> web.Response:
    _note(request, error, title or error.title)
    return _problem(error, status)


def _note(request: web.Request, error: EdgeError, title: str) -> None:
    """A fault of this machine is said, a refusal is counted; what every honest device may meet is neither."""
    coordinator = request.app[COORDINATOR]
    if isinstance(error, OurFault) and not isinstance(error, TooOften):
        if not isinstance(error, Busy):
            resource = request.match_info.route.resource
            place = resource.canonical if resource else request.path
            coordinator.faults.log(f"{request.method} {place}", error)
    elif not isinstance(error, ROUTINE):
        device = request.get(DEVICE)
        address = client_address(request)
        sender = f"{address}, device {device}" if device else address
        asked = f"{request.method} {request.path}: "
        coordinator.refusals.add(title, sender, asked + str(error).removeprefix(asked))


def _problem(error: EdgeError, status: int | None = None) -> web.Response:
    detail = printable(error, MAX_DETAIL)
    document = {"title": error.title, "status": status or error.status, "detail": detail, **error.details}
    response = web.json_response(
        document, status=status or error.status, content_type=messages.PROBLEM_CONTENT_TYPE
    )
    if isinstance(error, Busy):
        response.headers["Retry-After"] = str(math.ceil(error.details["retry_after_s"]))
    return response


def _token(request: web.Request) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthorised("send the credential as `Authorization: Bearer …`")
    return token


def _device(request: web.Request) -> str:
    coordinator = request.app[COORDINATOR]
    device = request[DEVICE] = coordinator.door.authenticate(_token(request), client_address(request))
    coordinator.allowances.request(device)
    return device


def _member(request: web.Request) -> str:
    """A device that takes part, or did when it began what it asks about."""
    device = _device(request)
    request.app[COORDINATOR].door.require_member(device)
    return device


def _host(request: web.Request) -> None:
    """Let in the host alone."""
    asked = f"{request.method} {request.path}"
    request.app[COORDINATOR].door.require_host(_token(request), client_address(request), asked)


async def _body(request: web.Request, kind: type[Record]) -> Record:
    """Read and decode a JSON record of bounded size within a bounded time."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return decode(kind, await request.read())  # whatever charset the header claims
    except web.HTTPRequestEntityTooLarge as error:
        raise TooLarge(f"a record has at most {MAX_RECORD_BYTES} bytes") from error
    except ValueError as error:
        raise ProtocolError(f"{kind.__name__}: the body is not JSON") from error


def _number(request: web.Request, name: str) -> int:
    text = request.match_info[name]
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise NotFound(f"{name} {text[:40]!r} is not a number")
    return int(text)


def _reply(record: Any, status: int = 200) -> web.Response:
    return web.Response(body=encode(record), status=status, content_type="application/json")


async def join(request: web.Request) -> web.Response:
    """POST /v1/join."""
    coordinator = request.app[COORDINATOR]
    token, address = _token(request), client_address(request)
    coordinator.door.require_invited(token, address)
    reply = await coordinator.join(await _body(request, JoinRequest), token, address)
    return _reply(reply, status=201)


async def federation(request: web.Request) -> web.Response:
    """GET /v1/federation, for devices and for those about to join."""
    door, token = request.app[COORDINATOR].door, _token(request)
    if not door.is_invited(token):  # so that one who was a device hears that it is none
        _device(request)
    return _reply(request.app[COORDINATOR].federation)


async def ask(request: web.Request) -> web.Response:
    """POST /v1/assignments."""
    device = _device(request)
    answer = await request.app[COORDINATOR].ask(device, await _body(request, Ask))
    if isinstance(answer, NotNow):
        response = _reply(answer, status=503)
        response.headers["Retry-After"] = str(math.ceil(answer.retry_after_s))
        return response
    return _reply(answer)


async def heartbeat(request: web.Request) -> web.Response:
    """POST /v1/assignments/{id}/heartbeat."""
    device = _device(request)
    beat = await _body(request, Heartbeat)
    return _reply(request.app[COORDINATOR].heartbeat(device, request.match_info["id"], beat))


async def upload_offset(request: web.Request) -> web.Response:
    """HEAD /v1/assignments/{id}/adapter: how many bytes are stored; all, once they are acknowledged."""
    coordinator, id = request.app[COORDINATOR], request.match_info["id"]
    device = _device(request)
    coordinator.require_assignment(device, id)
    coordinator.require_counts(device)
    coordinator.require_upload(device)  # said before the bytes come
    request.app[INTAKE].require_room()
    return web.Response(headers={messages.UPLOAD_OFFSET: str(coordinator.uploads.stored_bytes(id))})


async def upload(request: web.Request) -> web.Response:
    """PATCH /v1/assignments/{id}/adapter: append the body at Upload-Offset; what came before a cut stays."""
    coordinator, id = request.app[COORDINATOR], request.match_info["id"]
    device = _device(request)
    assignment = coordinator.require_assignment(device, id)
    coordinator.require_counts(device)
    text = request.headers.get(messages.UPLOAD_OFFSET, "")
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise ProtocolError(f"{messages.UPLOAD_OFFSET}: {text[:40]!r} is not a number of bytes")
    coordinator.uploads.require_fits(assignment, request.content_length or 0)
    coordinator.require_upload(device)
    append, intake = partial(coordinator.append, device, assignment), request.app[INTAKE]
    async with intake.turn(device, id, request.transport, coordinator.limits.uploads_of_device):
        with intake.place(request.transport) as place:
            offset = await receive(request.content, int(text), append, place)
    return web.Response(status=204, headers={messages.UPLOAD_OFFSET: str(offset)})


async def deliver(request: web.Request) -> web.Response:
    """POST /v1/assignments/{id}/update: 202 once the update is on disk for good."""
    device = _device(request)
    update = await _body(request, Update)
    reply = await request.app[COORDINATOR].deliver(device, request.match_info["id"], update)
    return _reply(reply, status=202)


async def adapter(request: web.Request) -> web.StreamResponse:
    """GET the adapter of a version at a rank, in a dtype: immutable, so any cache may keep it."""
    _member(request)
    dtype = request.match_info.get("dtype", "float32")
    if dtype not in WIRE_DTYPES:
        raise NotFound(f"dtype {dtype[:40]!r} is not served; {', '.join(WIRE_DTYPES)} are")
    coordinator = request.app[COORDINATOR]
    rung, version = Rung(_number(request, "rank"), dtype), _number(request, "version")
    with contextlib.ExitStack() as held:
        held.enter_context(coordinator.serving.holding(version, rung))
        path = await coordinator.adapter(version, rung)
        return HeldFile(path, held.pop_all())


class HeldFile(web.FileResponse):
    """An adapter that is not collected before it was sent."""

    def __init__(self, path: Path, held: contextlib.ExitStack) -> None:
        headers = {
            "Content-Type": "application/octet-stream",
            "Cache-Control": "private, max-age=31536000, immutable",
        }
        super().__init__(path, headers=headers)
        self._held = held

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send it, and let go of it."""
        with self._held, at_work(request, sends_file=True):
            try:
                return await super().prepare(request)
            except RuntimeError as error:  # what asyncio calls a connection that is gone
                if request.transport is None or request.transport.is_closing():
                    raise ConnectionResetError("the receiver is gone") from error
                raise


async def adapter_config(request: web.Request) -> web.Response:
    """GET the PEFT config beside that file."""
    _member(request)
    coordinator = request.app[COORDINATOR]
    rank = _number(request, "rank")
    coordinator.require_version(_number(request, "version"), rank)
    base, scaling = coordinator.federation.base, coordinator.federation.scaling
    return web.json_response(codec.peft_config(base.model, base.modules, rank, scaling))


async def newest(request: web.Request) -> web.Response:
    """GET /v1/newest."""
    _member(request)
    return _reply(request.app[COORDINATOR].newest())


async def renew(request: web.Request) -> web.Response:
    """POST /v1/credential."""
    device = _device(request)
    return _reply(await request.app[COORDINATOR].door.renew(device, client_address(request)), status=201)


async def leave(request: web.Request) -> web.Response:
    """POST /v1/leave."""
    device = _device(request)
    await request.app[COORDINATOR].leave(device, client_address(request))
    return web.Response(status=204)


async def status(request: web.Request) -> web.Response:
    """GET /v1/status, for the host."""
    _host(request)
    page = request.query.get("page", "0")
    if not page.isascii() or not page.isdigit() or len(page) > 9:
        raise ProtocolError(f"page {page[:40]!r} is not a number")
    text = await request.app[COORDINATOR].status(int(page))
    return web.Response(body=text, content_type="application/json")


async def description(request: web.Request) -> web.Response:
    """GET /v1/openapi.json, for anyone: it holds nothing of this federation."""
    serving = request.app[ENDPOINT].serving
    document = openapi.document(serving.public_url or serving.path_prefix)
    return web.Response(body=document, content_type="application/json")


HANDLERS: Mapping[str, Handler] = {
    "join": join,
    "federation": federation,
    "ask": ask,
    "heartbeat": heartbeat,
    "upload_offset": upload_offset,
    "upload": upload,
    "deliver": deliver,
    "adapter": adapter,
    "adapter_in": adapter,
    "adapter_config": adapter_config,
    "newest": newest,
    "renew": renew,
    "leave": leave,
    "status": status,
    "openapi": description,
}
"""By the names of `edge_sdk.core.routes.ROUTES`."""
