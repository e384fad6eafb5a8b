"""How long to wait: by hand, and for whatever somebody sends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core.errors import OurFault, Unreachable
from edge_sdk.system.backoff import (
    FIRST_S,
    MOST_ASKED_S,
    MOST_S,
    Backoff,
    asked_by,
    asked_wait_s,
    within_reason,
)

DATE = "Wed, 06 Nov 1996 08:49:37 GMT"


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": " 120 "}, 120.0),
        ({"Retry-After": "9" * 400}, MOST_ASKED_S),
        ({"Retry-After": "86400"}, MOST_ASKED_S),
        ({"Retry-After": "Wed, 06 Nov 1996 08:51:37 GMT", "Date": DATE}, 120.0),
        ({"Retry-After": "Wed, 06 Nov 1996 09:51:37 +0100", "Date": DATE}, 120.0),
        ({"Retry-After": DATE, "Date": DATE}, 0.0),
        ({"Retry-After": "Tue, 05 Nov 1996 08:49:37 GMT", "Date": DATE}, 0.0),  # it is over already
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT", "Date": DATE}, MOST_ASKED_S),
        ({"Retry-After": "Wed, 06 Nov 1996 08:51:37 GMT"}, None),  # by whose clock?
        ({"Retry-After": "Wed, 06 Nov 1996 08:51:37 GMT", "Date": "yesterday"}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "1.5"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "٣"}, None),
        ({"Retry-After": ""}, None),
        ({}, None),
    ],
)
def test_retry_after(headers: dict[str, str], wait_s: float | None) -> None:
    assert asked_wait_s(headers) == wait_s


@given(st.text(max_size=40), st.text(max_size=40))
def test_whatever_the_headers_say_a_wait_is_within_reason(after: str, date: str) -> None:
    wait_s = asked_wait_s({"Retry-After": after, "Date": date})
    assert wait_s is None or 0 <= wait_s <= MOST_ASKED_S


def test_an_error_carries_a_wait_only_if_this_side_put_it_there() -> None:
    assert asked_by(OurFault("busy", retry_after_s=5.0)) == 5.0
    assert asked_by(OurFault("busy", retry_after_s="for ever")) == 0.0
    assert asked_by(Unreachable("nobody")) == 0.0
    assert (within_reason(-1.0), within_reason(1e300)) == (0.0, MOST_ASKED_S)


def test_the_bound_doubles_to_the_most_and_begins_anew_after_success() -> None:
    backoff = Backoff(draw=lambda: 1.0)
    waits = [backoff.next_s() for _ in range(8)]
    assert waits == [FIRST_S * 2**n for n in range(6)] + [MOST_S, MOST_S]
    backoff.reset()
    assert backoff.next_s() == FIRST_S


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=30), st.floats(0, MOST_ASKED_S))
def test_it_waits_as_long_as_asked_and_never_much_longer(draws: list[float], asked_s: float) -> None:
    at = iter(draws * 2)
    backoff = Backoff(draw=lambda: next(at))
    for _ in draws:
        wait_s = backoff.next_s(asked_s)
        assert asked_s <= wait_s <= max(MOST_S, 1.25 * asked_s)


def test_devices_that_failed_together_come_back_apart() -> None:
    """Full jitter: 2,000 devices in their fourth wait, of at most 8 s, are spread evenly over these."""
    fourth = []
    for _ in range(2000):
        backoff = Backoff()
        fourth.append([backoff.next_s() for _ in range(4)][3])
    in_each_second = [sum(second <= wait_s < second + 1 for wait_s in fourth) for second in range(8)]
    assert min(in_each_second) > 150  # 250 each; the chance of one below 150 is under 1e-9
