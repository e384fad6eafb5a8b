"""The OpenAPI document says what the coordinator does: its routes, and every answer of a running one."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args

import httpx
import jsonschema
import openapi_spec_validator
import pytest

import coordinator as package
from coordinator.web.app import HANDLERS, build_app
from coordinator.web.openapi import document
from edge_sdk.core import messages
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import EdgeError, subclasses
from edge_sdk.core.messages import Ask, Heartbeat, JoinRequest
from edge_sdk.core.records import encode, to_json
from edge_sdk.core.routes import PLACEHOLDERS, ROUTES
from tests.coordinator.devices import FINGERPRINT, SCALING, configuration, random_adapter, update_of
from tests.processes import CoordinatorProcess

DOCUMENT = json.loads(document())
SCHEMAS = DOCUMENT["components"]["schemas"]


def test_it_is_valid_openapi() -> None:
    openapi_spec_validator.validate(DOCUMENT)
    assert DOCUMENT["openapi"].startswith("3.1.")
    assert DOCUMENT["info"]["version"] == package.__version__


def test_routes_and_document_are_the_same() -> None:
    """What is registered with aiohttp, however it came there, is described; what answers GET answers HEAD."""
    app = build_app(cast(Any, object()))
    served = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}
    described = {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert described <= served
    assert {(method, path) for method, path in served - described if method != "HEAD"} == set()
    assert {("GET", path) for method, path in served - described} <= described
    assert len(described) == len(ROUTES)


def test_every_route_has_a_handler_and_a_name_of_its_own() -> None:
    assert sorted(HANDLERS) == sorted(route.name for route in ROUTES)


def test_every_path_of_the_wire_is_a_route() -> None:
    paths = {value for value in vars(messages).values() if isinstance(value, str) and "/v1/" in value}
    assert paths == {route.path for route in ROUTES}
    assert {name for path in paths for name in re.findall(r"{(\w+)}", path)} == set(PLACEHOLDERS)


def test_parameters_of_paths_have_types() -> None:
    (found,) = [route for route in ROUTES if route.path == messages.ADAPTER_IN]
    operation = DOCUMENT["paths"][found.path]["get"]
    kinds = {given["name"]: given["schema"] for given in operation["parameters"] if given["in"] == "path"}
    dtypes = sorted(get_args(messages.WireDtype))
    assert kinds == {
        "version": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
        "rank": {"type": "integer", "minimum": 1, "maximum": 2**16},
        "dtype": {"enum": dtypes},
    }


def test_ranges_of_fields_are_said() -> None:
    update = SCHEMAS["Update"]["properties"]
    assert update["steps"] == {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
    assert update["train_s"] == {"type": "number", "minimum": 0, "maximum": 1e9}
    assert re.search(update["digest"]["pattern"], "ab" * 32)
    identifier = SCHEMAS["Federation"]["properties"]["id"]
    assert identifier["type"] == "string"
    for text, good in (("a-1_B", True), ("", False), ("../x", False), ("a\n", False), ("a" * 65, False)):
        assert bool(re.search(identifier["pattern"], text)) == good
    assert SCHEMAS["Base"]["properties"]["modules"]["maxProperties"] == messages.MODULES


def test_whose_secret_a_request_carries() -> None:
    security = {
        route.name: DOCUMENT["paths"][route.path][route.method.lower()]["security"] for route in ROUTES
    }
    assert security["join"] == [{"joinToken": []}]
    assert security["ask"] == security["adapter"] == [{"credential": []}]
    assert security["federation"] == [{"credential": []}, {"joinToken": []}]
    assert security["status"] == [{"hostToken": []}]
    assert security["openapi"] == []
    assert set(DOCUMENT["components"]["securitySchemes"]) == {"joinToken", "credential", "hostToken"}


def test_records_are_described_field_by_field() -> None:
    for route in ROUTES:
        for kind in (route.body, *(answer.content for answer in route.answers)):
            if isinstance(kind, type):
                assert set(SCHEMAS[kind.__name__]["properties"]) == {f.name for f in dataclasses.fields(kind)}
    assert SCHEMAS["Ask"]["required"] == ["rank"]
    assert SCHEMAS["Ask"]["properties"]["carry_rank"] == {
        "type": "integer",
        "minimum": 0,
        "maximum": 2**16,
        "default": 0,
    }


# --- a running coordinator ------------------------------------------------------------------------


class Checked:
    """A coordinator whose every answer is held against the document."""

    def __init__(self, running: CoordinatorProcess) -> None:
        self._running = running
        self.seen: set[tuple[str, int]] = set()

    def __call__(
        self, name: str, token: str | None = None, place: dict[str, Any] | None = None, **arguments: Any
    ) -> httpx.Response:
        (route,) = [route for route in ROUTES if route.name == name]
        headers = arguments.pop("headers", {}) | ({"Authorization": f"Bearer {token}"} if token else {})
        if "record" in arguments:
            arguments["content"] = encode(arguments.pop("record"))
        url = self._running.url + route.path.format(**place or {})
        answer = httpx.request(route.method, url, headers=headers, timeout=30.0, **arguments)
        self._check(DOCUMENT["paths"][route.path][route.method.lower()], answer)
        self.seen.add((name, answer.status_code))
        return answer

    def _check(self, operation: dict[str, Any], answer: httpx.Response) -> None:
        described = operation["responses"][str(answer.status_code)]
        for name, header in described.get("headers", {}).items():
            value = answer.headers[name]
            as_said = int(value) if header["schema"]["type"] == "integer" else value
            jsonschema.validate(as_said, header["schema"])
        if "content" not in described:
            assert answer.content == b""
            return
        kind = answer.headers["Content-Type"].partition(";")[0]
        schema = described["content"][kind].get("schema")
        if schema is None:
            return
        jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(
            answer.json()
        )
        if "$ref" in schema and not schema["$ref"].endswith("/Problem"):
            known = SCHEMAS[schema["$ref"].rpartition("/")[2]]["properties"]
            assert set(answer.json()) == set(known)  # nothing that is not described, and all that is


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorProcess]:
    folder: Path = tmp_path_factory.mktemp("described")
    with CoordinatorProcess(folder, configuration(folder, {"buffer_size": 1000, "quorum": 1000})) as process:
        yield process


def test_answers_of_a_running_coordinator_are_as_described(running: CoordinatorProcess) -> None:
    """The life of a device by hand, from joining to its update."""
    call, guest = Checked(running), running.join_token
    assert call("openapi").content == document()
    call("federation", guest)
    credential = call("join", guest, record=JoinRequest("attic", FINGERPRINT)).json()["credential"]
    work = call("ask", credential, record=Ask(4)).json()
    content, here = codec.encode(random_adapter(4, 0), SCALING), {"id": work["id"]}
    call("heartbeat", credential, here, record=Heartbeat(3))
    assert call("upload_offset", credential, here).headers[messages.UPLOAD_OFFSET] == "0"
    start = {messages.UPLOAD_OFFSET: "0", "Content-Type": messages.OFFSET_CONTENT_TYPE}
    call("upload", credential, here, content=content, headers=start)
    call("deliver", credential, here, record=update_of(content, 4))
    call("ask", credential, record=Ask(4))
    file = {"version": 0, "rank": 4, "dtype": "int8"}
    for name in ("adapter", "adapter_in", "adapter_config"):
        call(name, credential, file)
    call("adapter", credential, file, headers={"Range": "bytes=8-"})
    call("adapter", credential, file, headers={"Range": "bytes=1000000000-"})
    tag = call("adapter", credential, file).headers["ETag"]
    call("adapter", credential, file, headers={"If-None-Match": tag})
    call("adapter", credential, file, headers={"If-Match": '"another"'})
    assert call("newest", credential).json() == {"version": 0, "rank": 0, "start": ""}
    assert call("status", running.host_token).json()["devices"][0]["name"] == "attic"
    credential = call("renew", credential).json()["credential"]
    call("leave", credential)
    assert call("ask", credential, record=Ask(4)).status_code == 401
    successes = {(name, status) for name, status in call.seen if status < 300}
    assert {name for name, _ in successes} == {route.name for route in ROUTES}
    assert call.seen >= {("ask", 503), ("adapter", 206), ("adapter", 304), ("adapter", 412), ("adapter", 416)}


def test_refusals_of_a_running_coordinator_are_as_described(running: CoordinatorProcess) -> None:
    call, guest = Checked(running), running.join_token
    for route in ROUTES:
        if route.caller != "anyone":
            assert call(route.name, "wrong", dict.fromkeys(PLACEHOLDERS, 1)).status_code == 401
    credential = call("join", guest, record=JoinRequest("cellar", FINGERPRINT)).json()["credential"]
    assert call("join", guest, record=JoinRequest("attic", "cd" * 32)).status_code == 409
    assert call("join", guest, content=b"{").status_code == 400
    assert call("ask", credential, record=Ask(3)).status_code == 400
    assert call("ask", credential, content=b"x" * (65 << 10)).status_code == 413
    nowhere = {"id": "nowhere", "version": 7, "rank": 4, "dtype": "int8"}
    for name, body in (
        ("heartbeat", {"record": Heartbeat(1)}),
        ("upload_offset", {}),
        ("upload", {"content": b"x", "headers": {messages.UPLOAD_OFFSET: "0"}}),
        ("adapter", {}),
        ("adapter_in", {}),
        ("adapter_config", {}),
    ):
        assert call(name, credential, nowhere, **body).status_code == 404
    here = {"id": call("ask", credential, record=Ask(4)).json()["id"]}
    content = codec.encode(random_adapter(8, 0), SCALING)
    start = {messages.UPLOAD_OFFSET: "5"}
    assert call("upload", credential, here, content=b"x", headers=start).status_code == 409
    assert call("deliver", credential, here, record=update_of(content, 4)).status_code == 409


def test_every_refusal_is_an_error_of_the_tree() -> None:
    for route in ROUTES:
        assert set(route.refusals) <= set(subclasses(EdgeError))
        described = DOCUMENT["paths"][route.path][route.method.lower()]["responses"]
        assert set(described) >= {str(error.status) for error in route.refusals} | {"default"}


def test_records_have_the_form_that_the_document_gives_them() -> None:
    """A wrong answer would be noticed: the check of answers is not empty."""
    validator = jsonschema.Draft202012Validator(SCHEMAS["Ask"])
    validator.validate(to_json(Ask(4)))
    for wrong in ({}, {"rank": "4"}, {"rank": 4, "carry_rank": None}, []):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(wrong)
