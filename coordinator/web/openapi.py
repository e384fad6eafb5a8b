"""The routes and records of the wire as an OpenAPI 3.1 document (https://spec.openapis.org/oas/v3.1.0).

All of it comes from `edge_sdk.core.routes` and the records named there; nothing is said here a second time.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from edge_sdk.core.errors import Busy
from edge_sdk.core.messages import PROBLEM_CONTENT_TYPE
from edge_sdk.core.routes import (
    PLACEHOLDERS,
    RETRY_AFTER,
    ROUTES,
    Answer,
    Bytes,
    Caller,
    Header,
    Problem,
    Query,
    Route,
)
from edge_sdk.core.version import __version__

Json = dict[str, Any]

SCHEMES: Json = {
    "joinToken": {
        "type": "http",
        "scheme": "bearer",
        "description": "Of an invitation, or of this machine: it lets a device in, and no more.",
    },
    "hostToken": {
        "type": "http",
        "scheme": "bearer",
        "description": "The host's own; it lies in the data folder.",
    },
    "credential": {
        "type": "http",
        "scheme": "bearer",
        "description": "A device's own, as the answer to its joining gives it.",
    },
}
SECURITY: dict[Caller, list[Json]] = {
    "join token": [{"joinToken": []}],
    "credential": [{"credential": []}],
    "either": [{"credential": []}, {"joinToken": []}],
    "host": [{"hostToken": []}],
    "anyone": [],
}


@functools.cache
def document(server: str = "") -> bytes:
    """The document as JSON; `server`: the address or the path that its paths follow, if there is one."""
    records = [Problem, *dict.fromkeys(_records(ROUTES))]
    references, schemas = msgspec.json.schema_components(records, ref_template="#/components/schemas/{name}")
    known = dict(zip(records, references, strict=True))
    paths: dict[str, Json] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, known)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "FlexLoRA coordinator", "version": __version__},
            **({"servers": [{"url": server}]} if server else {}),
            "paths": paths,
            "components": {"schemas": schemas, "securitySchemes": SCHEMES},
        }
    )


def _records(routes: Iterable[Route]) -> Iterator[type]:
    """What the routes name of records."""
    for route in routes:
        for content in (route.body, *(answer.content for answer in route.answers)):
            if isinstance(content, type):
                yield content


def _operation(route: Route, known: dict[type, Json]) -> Json:
    """One method on one path."""
    names = re.findall(r"{(\w+)}", route.path)
    operation: Json = {
        "operationId": route.name,
        "summary": route.summary,
        "security": SECURITY[route.caller],
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": _schema(name)} for name in names),
            *({"name": header.name, "in": "header", **_header(header)} for header in route.headers),
            *({"name": query.name, "in": "query", **_header(query)} for query in route.queries),
        ],
        "responses": _responses(route, known),
    }
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": _content(route.body, known)}
    return operation


def _schema(placeholder: str) -> Json:
    return msgspec.json.schema(PLACEHOLDERS[placeholder])


def _header(header: Header | Query) -> Json:
    required = {"required": True} if isinstance(header, Header) and header.required else {}
    return {"description": header.meaning, **required, "schema": msgspec.json.schema(header.kind)}


def _content(content: type | Bytes, known: dict[type, Json]) -> Json:
    """A body of this kind, by its media type."""
    if isinstance(content, type):
        kind = PROBLEM_CONTENT_TYPE if content is Problem else "application/json"
        return {kind: {"schema": known[content]}}
    # Bytes have no schema in OpenAPI 3.1; of JSON that is no record of ours only this is known.
    return {content.media_type: {"schema": {"type": "object"}} if content.media_type.endswith("json") else {}}


def _responses(route: Route, known: dict[type, Json]) -> Json:
    """By status: answers, refusals, and what else may go wrong."""
    responses: Json = {}
    for answer in (*route.answers, *_refusals(route)):
        status = str(answer.status) if answer.status else "default"
        response = responses.setdefault(status, {"description": answer.meaning})
        if response["description"] != answer.meaning:
            response["description"] += f" Or: {answer.meaning}"
        if answer.headers:
            response.setdefault("headers", {}).update({h.name: _header(h) for h in answer.headers})
        if answer.content is not None:
            response.setdefault("content", {}).update(_content(answer.content, known))
    return responses


def _refusals(route: Route) -> Iterator[Answer]:
    """The problem documents of a route; those of HEAD come without a body. Status 0 stands for any other."""
    content = None if route.method == "HEAD" else Problem
    for error in route.refusals:
        headers = (RETRY_AFTER,) if issubclass(error, Busy) else ()
        yield Answer(error.status, content, f"{error.title.capitalize()}.", headers)
    yield Answer(0, content, "Any other problem.")
