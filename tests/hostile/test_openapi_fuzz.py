"""The routes that a coordinator describes, fuzzed by that description: right and wrong requests.

Bounded, and the same in every run. Every answer must be one that the description knows.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import hypothesis
import msgspec
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from coordinator.web import openapi
from edge_sdk.core.messages import OFFSET_CONTENT_TYPE
from edge_sdk.core.routes import ROUTES
from tests.coordinator.devices import FINGERPRINT
from tests.hostile.harness import attacked, bearer

schemathesis.serializer.alias(OFFSET_CONTENT_TYPE, "application/octet-stream")
EXAMPLES = 60  # of each route
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
LIMITS: dict[str, object] = {"requests_s": 1e4, "refusals_s": 1e4}
LIMITS |= {"joins_minute": 100_000, "joins_minute_of_address": 100_000}


@pytest.fixture(scope="module")
def schema() -> Any:
    return schemathesis.openapi.from_dict(msgspec.json.decode(openapi.document()))


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_whatever_the_description_allows_or_forbids(tmp_path: Path, schema: Any, route: Any) -> None:
    """With the right secret or a wrong one, and now and then with values that mean something."""
    with attacked(tmp_path, limits=LIMITS) as target, contextlib.closing(target.device()) as device:
        work = device.work()
        of = {"join token": target.coordinator.join_token, "host": target.coordinator.host_token}
        secret = of.get(route.caller, device.credential)
        known = {"id": work, "version": 0, "rank": 4, "fingerprint": FINGERPRINT, "steps": 20}
        secrets, seen = [secret, secret, secret, "wrong"], set()

        @hypothesis.settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(data=hypothesis.strategies.data())
        def fuzz(data: Any) -> None:
            operation = schema[route.path][route.method]
            mode = data.draw(hypothesis.strategies.sampled_from(list(schemathesis.GenerationMode)))
            case = data.draw(operation.as_strategy(generation_mode=mode))
            for place in (case.path_parameters, case.body):
                if isinstance(place, dict) and data.draw(hypothesis.strategies.booleans()):
                    place |= {name: value for name, value in known.items() if name in place}
            sent = data.draw(hypothesis.strategies.sampled_from(secrets))
            answer = case.call(base_url=target.coordinator.url, headers=bearer(sent), timeout=60.0)
            seen.add(answer.status_code)
            case.validate_response(answer, checks=CHECKS)

        fuzz()
        assert seen >= ({200} if route.caller == "anyone" else {401}), seen
