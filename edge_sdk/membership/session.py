"""What a device does next, as a pure state machine: no I/O, no clock.

                joined            assigned            trained           delivered
    (nothing) ────────► idle ──────────────► training ─────────► outbox ──────────► idle
                          ▲                     │ ▲      spoilt     │
                          │                     │ └─────────────────┤
                          └───── dropped ───────┴───────────────────┘

A `Session` is all that a device must remember over a power cut; `journal` keeps it. Every arrow is one
function from a session to the next one, and an arrow that does not leave the present phase is a bug.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from edge_sdk.core.choice.setting import Setting
from edge_sdk.core.errors import InternalError, ProtocolError
from edge_sdk.core.messages import Assignment, Federation, JoinReply, Update
from edge_sdk.core.ranges import Count, Credential, Id, Name, Pin, Run, Version

Phase = Literal["idle", "training", "outbox"]


@dataclass(frozen=True)
class Session:
    """A device's membership and the work in its hands."""

    url: Name
    device_id: Id
    credential: Credential
    federation: Federation
    phase: Phase = "idle"
    assignment: Assignment | None = None  # while training or in the outbox
    setting: Setting | None = None  # how that assignment is trained
    update: Update | None = None  # while in the outbox
    delivered: Count = 0
    last_version: Version = 0  # newest version heard of
    run: Run = ""  # the coordinator's, as last heard of; "" from one that names none
    pin: Pin = ""  # of the coordinator's key; "" where an authority vouches for it, or there is no TLS

    def __post_init__(self) -> None:
        """Raise ProtocolError for a phase without the records that it needs, as a damaged file may say."""
        needed = {
            "idle": [],
            "training": ["assignment", "setting"],
            "outbox": ["assignment", "setting", "update"],
        }
        for name in needed[self.phase]:
            if getattr(self, name) is None:
                raise ProtocolError(f"Session.{name} is missing in phase {self.phase}")

    def current(self) -> Assignment:
        """The assignment in hand."""
        if self.assignment is None:
            raise InternalError(f"no assignment in phase {self.phase}")
        return self.assignment

    def way(self) -> Setting:
        """How the assignment in hand is trained."""
        if self.setting is None:
            raise InternalError(f"no setting in phase {self.phase}")
        return self.setting


def joined(url: str, reply: JoinReply, before: Session | None = None, pin: str = "") -> Session:
    """A new member with nothing to do yet; `pin` is that of the key that the coordinator has shown.

    `before`: its membership in the same federation until now, of which the coordinator does not know. Its run
    stays until there is work, so that the coordinator hears of that one.
    """
    run = before.run if before and before.run else reply.run
    return Session(url, reply.device_id, reply.credential, reply.federation, run=run, pin=pin)


def assigned(session: Session, assignment: Assignment, setting: Setting) -> Session:
    """Work was granted, and will be trained in this way."""
    _require(session, "idle")
    return replace(
        session,
        phase="training",
        assignment=assignment,
        setting=setting,
        last_version=assignment.version,
        run=assignment.run,
    )


def refitted(session: Session, setting: Setting) -> Session:
    """The work in hand goes on in another way."""
    _require(session, "training")
    return replace(session, setting=setting)


def trained(session: Session, update: Update) -> Session:
    """The adapter is finished and lies in the outbox."""
    _require(session, "training")
    return replace(session, phase="outbox", update=update)


def delivered(session: Session, current_version: int) -> Session:
    """The coordinator has the update on disk."""
    _require(session, "outbox")
    return replace(_idle(session), delivered=session.delivered + 1, last_version=current_version)


def spoilt(session: Session) -> Session:
    """The finished adapter is damaged on this disk; it is trained again, from its checkpoint if possible."""
    _require(session, "outbox")
    return replace(session, phase="training", update=None)


def dropped(session: Session) -> Session:
    """The work can no longer count: told to abandon it, or the update was refused."""
    _require(session, "training", "outbox")
    return _idle(session)


def _idle(session: Session) -> Session:
    return replace(session, phase="idle", assignment=None, setting=None, update=None)


def _require(session: Session, *phases: Phase) -> None:
    if session.phase not in phases:
        raise InternalError(
            f"a session in phase {session.phase} cannot do this; expected {' or '.join(phases)}"
        )
