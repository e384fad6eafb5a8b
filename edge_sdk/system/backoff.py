"""How long to wait before the next attempt: what the other side asked for, or a back-off of our own.

No clock is read: a date counts from the date of the answer that names it.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime

from edge_sdk.core.errors import EdgeError

FIRST_S, MOST_S = 1.0, 60.0
MOST_ASKED_S = 3600.0  # whatever somebody asks for, a device looks again this often
WAIT = "retry_after_s"  # the detail of an error that says how long the other side asked to be left alone


def asked_wait_s(headers: Mapping[str, str]) -> float | None:
    """What Retry-After asks for (RFC 9110, section 10.2.3), at most MOST_ASKED_S; None where it says nothing.

    A date is taken relative to the answer's own Date header, and says nothing without one.
    """
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return within_reason(float(text[:20]))
    until, now = _date(text), _date(headers.get("Date", ""))
    return within_reason((until - now).total_seconds()) if until and now else None


def within_reason(wait_s: float) -> float:
    """A wait that somebody else asks for, from 0 to MOST_ASKED_S; what is not a number is 0."""
    return float(min(MOST_ASKED_S, max(0.0, wait_s)))


def asked_by(error: EdgeError) -> float:
    """The wait that an error carries; 0 where it carries none."""
    wait_s = error.details.get(WAIT)
    return wait_s if isinstance(wait_s, float) else 0.0


def _date(text: str) -> datetime.datetime | None:
    """A date in the form of HTTP headers; None for anything else."""
    try:
        found = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)


class Backoff:
    """Waits between attempts that fail, drawn anew each time.

    Uniform between 0 and a bound that doubles ("full jitter": M. Brooker, Exponential Backoff And Jitter,
    AWS Architecture Blog, 2015), so that devices which failed together do not come back together.

    Attributes:
        bound_s: what the last wait was drawn below; 0 before the first failure.
    """

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        self._draw = draw
        self.bound_s = 0.0

    def next_s(self, asked_s: float = 0.0) -> float:
        """The wait after one more failure: never less than `asked_s`, of which up to a quarter is added."""
        self.bound_s = min(MOST_S, max(FIRST_S, 2 * self.bound_s))
        return max(self.bound_s * self._draw(), self.spread_s(asked_s))

    def spread_s(self, asked_s: float) -> float:
        """A wait that was asked for, and up to a quarter more: devices told the same do not come together."""
        return asked_s * (1 + self._draw() / 4)

    def reset(self) -> None:
        """An attempt went well; the next failure waits little again."""
        self.bound_s = 0.0
