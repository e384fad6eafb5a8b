"""Refused requests in the log: a line for the first of a kind, one a minute for others; all are counted."""

from __future__ import annotations

import logging

import pytest

from coordinator.service.refusals import AGAIN_S, Refusals


@pytest.fixture
def now() -> list[float]:
    return [100.0]


@pytest.fixture
def refusals(now: list[float], caplog: pytest.LogCaptureFixture) -> Refusals:
    caplog.set_level(logging.INFO, "coordinator")
    return Refusals(lambda: now[0])


def test_a_flood_is_one_line_a_minute(
    refusals: Refusals, now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    for second in range(180):
        now[0] = 100.0 + second
        refusals.add("not found", f"10.0.0.{second}", "GET /x: Not Found")
        refusals.flush()
    assert caplog.messages == [
        "refused (not found) from 10.0.0.0: GET /x: Not Found",
        "refused (not found): … and 60 more in the last minute, the last from 10.0.0.60",
        "refused (not found): … and 60 more in the last minute, the last from 10.0.0.120",
    ]
    refusals.flush(everything=True)
    assert caplog.messages[3:] == [
        "refused (not found): … and 59 more in the last minute, the last from 10.0.0.179"
    ]
    assert refusals.count == 180


def test_kinds_do_not_hide_one_another(refusals: Refusals, caplog: pytest.LogCaptureFixture) -> None:
    for kind in ("not found", "not authorised", "not found"):
        refusals.add(kind, "10.0.0.1", "x")
    assert [message[:20] for message in caplog.messages] == ["refused (not found) ", "refused (not authori"]


def test_one_after_a_quiet_minute_is_said_at_once(
    refusals: Refusals, now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    refusals.add("not found", "10.0.0.1", "first")
    now[0] += AGAIN_S
    refusals.flush()
    refusals.add("not found", "10.0.0.2", "second")
    assert [message[-6:] for message in caplog.messages] == [" first", "second"]


def test_one_that_comes_while_others_are_held_is_said_with_them(
    refusals: Refusals, now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    for wait_s in (0.0, 0.0, AGAIN_S):
        now[0] += wait_s
        refusals.add("not found", "10.0.0.1", "first")
    refusals.flush()
    assert len(caplog.messages) == 2
    assert "… and 2 more" in caplog.messages[1]


def test_a_strangers_words_are_one_short_line(refusals: Refusals, caplog: pytest.LogCaptureFixture) -> None:
    refusals.add("not found", "10.0.0.1", "GET /x\n00:00:00  version 9: 9 updates\x1b[8m" + "y" * 10_000)
    assert "\n" not in caplog.messages[0]
    assert "\x1b" not in caplog.messages[0]
    assert len(caplog.messages[0]) < 400
