"""Every arrow of the device's state machine, and what it must not do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.errors import InternalError, ProtocolError
from edge_sdk.core.messages import Assignment, JoinReply, Update
from edge_sdk.membership.session import Session, assigned, delivered, dropped, joined, spoilt, trained
from tests.edge_sdk.core.wire_samples import FEDERATION

WORK = Assignment(id="a", version=7, rank=4, carry_rank=16, steps=20, seed=9, expires_in_s=600.0)
UPDATE = Update("ab" * 32, 100, 4, 160, 20, 2.5, 1.25, 30.5)

IDLE = joined("http://host", JoinReply("d", "secret", FEDERATION))
SETTING = Setting(Ranks.uniform(4), carry_rank=0, sequence_len=32, micro_batch=2)
TRAINING = assigned(IDLE, WORK, setting=SETTING)
OUTBOX = trained(TRAINING, UPDATE)


def test_joining_gives_an_idle_member() -> None:
    assert Session("http://host", "d", "secret", FEDERATION) == IDLE
    assert (IDLE.phase, IDLE.assignment, IDLE.delivered) == ("idle", None, 0)


def test_the_round_of_one_update() -> None:
    assert (TRAINING.phase, TRAINING.current(), TRAINING.way()) == ("training", WORK, SETTING)
    assert TRAINING.last_version == 7
    assert (OUTBOX.phase, OUTBOX.current(), OUTBOX.update) == ("outbox", WORK, UPDATE)
    after = delivered(OUTBOX, current_version=9)
    assert (after.phase, after.assignment, after.update, after.setting) == ("idle", None, None, None)
    assert (after.delivered, after.last_version) == (1, 9)
    assert after.credential == IDLE.credential


@pytest.mark.parametrize("session", [TRAINING, OUTBOX])
def test_dropped_work_leaves_no_trace_but_the_version(session: Session) -> None:
    after = dropped(session)
    assert (after.phase, after.assignment, after.update, after.delivered) == ("idle", None, None, 0)
    assert after.last_version == 7


@pytest.mark.parametrize(
    ("arrow", "wrong"),
    [
        (lambda session: assigned(session, WORK, 1), [TRAINING, OUTBOX]),
        (lambda session: trained(session, UPDATE), [IDLE, OUTBOX]),
        (lambda session: delivered(session, 1), [IDLE, TRAINING]),
        (spoilt, [IDLE, TRAINING]),
        (dropped, [IDLE]),
    ],
)
def test_an_arrow_from_another_phase_is_a_bug_by_name(
    arrow: Callable[[Session], Session], wrong: list[Session]
) -> None:
    for session in wrong:
        with pytest.raises(InternalError, match=f"a session in phase {session.phase} cannot do this"):
            arrow(session)


def test_a_spoilt_outbox_is_trained_again_in_the_same_way() -> None:
    after = spoilt(OUTBOX)
    assert (after.phase, after.current(), after.way(), after.update) == ("training", WORK, SETTING, None)


@pytest.mark.parametrize(
    ("session", "name"),
    [(TRAINING, "assignment"), (TRAINING, "setting"), (OUTBOX, "assignment"), (OUTBOX, "update")],
)
def test_a_phase_without_what_it_needs_is_no_session(session: Session, name: str) -> None:
    with pytest.raises(ProtocolError, match=f"Session.{name} is missing in phase {session.phase}"):
        replace(session, **{name: None})


def test_an_idle_session_has_no_assignment() -> None:
    with pytest.raises(InternalError, match="no assignment in phase idle"):
        IDLE.current()
