"""Who a device is in a federation: its credential, its connection, and the session that survives a crash."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace

from edge_sdk.callbacks import Teller
from edge_sdk.connection.transport import Transport
from edge_sdk.core.errors import InputError, OurFault, Unauthorised, Unreachable
from edge_sdk.core.messages import Federation
from edge_sdk.membership import identity, limits
from edge_sdk.membership.journal import DIGESTS, Journal
from edge_sdk.membership.known_coordinator import names_another_key, require_known, trust_in
from edge_sdk.membership.session import Session, dropped, joined
from edge_sdk.options import Options, default_state_dir

FORGOTTEN = "the coordinator does not know this device any more"
MOST_TOLD_OF = 100  # runs; whoever makes up more of them than that is not listened to


class Membership:
    """One device's place in one federation. Only the agent's thread saves; `recall` is for any thread.

    Args:
        url: of the coordinator.
        options: how the device takes part.
        join_token: what lets it in, until it has joined.
        tell: hears what happens.
        pin: of the coordinator's key, if the owner was told it; otherwise the one of the session counts.
    """

    def __init__(
        self, url: str, options: Options, join_token: str | None, tell: Teller, pin: str = ""
    ) -> None:
        self.url, self.options, self.tell = url, options, tell
        self.journal = Journal(options.state_dir or default_state_dir(url, options.name))
        self._join_token, self._pin = join_token, pin
        self._session: Session | None = None
        self._transport: Transport | None = None
        self._checked = False
        self._connecting = threading.Lock()
        self._newest = 0
        self._told_of: set[str] = set()  # runs that the owner was told are not this coordinator's

    @property
    def session(self) -> Session:
        """What this device is doing."""
        if self._session is None:
            raise InputError("not a member yet; call prepare() first")
        return self._session

    @property
    def federation(self) -> Federation:
        """What this device takes part in."""
        return self.session.federation

    @property
    def transport(self) -> Transport:
        """The connection, once there is one."""
        if self._transport is None:
            raise InputError("not connected yet; call prepare() first")
        return self._transport

    def connect(self) -> None:
        """Take up the session of an earlier run, or join. Checks the base model either way.

        Raises:
            Unreachable, TheirFault: nobody answers, or this device is refused.
        """
        with self._connecting:
            if not self._checked:
                if mended := self.journal.mend():
                    self.tell("notice", mended)
                self._connect()
                self._checked = True

    def recall(self) -> None:
        """`connect` if the coordinator can be reached; otherwise what an earlier run remembers will do.

        Raises:
            Unreachable: there is no earlier run to remember.
        """
        try:
            self.connect()
        except (Unreachable, OurFault):
            if self._session is None and (known := self.journal.load()):
                known.federation.base.require(self._fingerprint(known.federation))
                self._session = known
            if self._session is None:
                raise

    def take_over(self) -> None:
        """Believe the disk, not the memory: another agent may have used the state folder since."""
        if self._session is not None:
            self._session = self.journal.load()
            self._checked = self._checked and self._session is not None

    def rejoin(self) -> bool:
        """Join anew, as a coordinator that was restored from an older copy needs; False without a join token.

        The work in hand is of an assignment that the coordinator does not know either.

        Raises:
            Unreachable: whoever says that it does not know this device may be anybody.
        """
        with self._connecting:
            if not self._join_token:
                return False
            self._join_again(self.session, FORGOTTEN)
            return True

    def asked_elsewhere(self) -> None:
        """Tell the owner, once of each, that the run which this device knows is not this coordinator's."""
        run = self.session.run
        if run not in self._told_of and len(self._told_of) < MOST_TOLD_OF:
            self._told_of.add(run)
            self.tell(
                "notice",
                f"this device has worked with another coordinator of this federation (run {run}): a copy of "
                "its folder runs, or this one was restored from an older backup; tell its host",
            )

    def renew(self) -> None:
        """Take another credential, as the coordinator asked; what fails is asked for again later."""
        with self._connecting, contextlib.suppress(Unreachable, OurFault):
            renewed = self.transport.renew().credential
            self.save(replace(self.session, credential=renewed))
            trust = self.transport.trust
            self.transport.close()
            self._transport = Transport(self.url, renewed, self.journal.link, trust)

    def _join_again(self, before: Session, why: str) -> None:
        require_known(self.url)
        self.tell("notice", f"{why}; it joins anew")
        self._told_of.add(before.run)  # that is the same news
        self._join(before)
        self.journal.clear_work()

    def _connect(self) -> None:
        known = self.journal.load()
        if known is None:
            self._join(None)
            return
        if names_another_key(self._pin, known):  # which must not get what the first one gave
            self._join_again(known, "the invitation names another key than the one that this device joined")
            return
        trust = trust_in(self.url, self._pin, self.options, known)
        self.close()
        self._transport = Transport(self.url, known.credential, self.journal.link, trust)
        try:
            federation = self._transport.federation()
        except Unauthorised:
            if not self._join_token:
                raise
            self._join_again(known, FORGOTTEN)
            return
        limits.require(federation, self.options.limits)
        federation.base.require(self._fingerprint(federation))
        self._require_same(known.federation, federation)
        # Its lease may be another by now, and so may its address.
        self._session = replace(known, federation=federation, url=self.url, pin=trust.pin)

    def _join(self, before: Session | None) -> None:
        """Become a member; `before` is what this state folder was until now, if it was of a federation."""
        if not self._join_token:
            raise InputError(
                "this device has not joined yet; give it the federation's join token, or an invitation"
            )
        trust = trust_in(self.url, self._pin, self.options, before)
        self.close()
        self._transport = Transport(self.url, self._join_token, self.journal.link, trust)
        federation = self._transport.federation()
        if before:
            self._require_same(before.federation, federation)
        limits.require(federation, self.options.limits)
        fingerprint = self._fingerprint(federation)
        federation.base.require(fingerprint)
        reply = self._transport.join(identity.request(fingerprint, self.options, self.journal.attempt()))
        if reply.federation != federation:
            raise Unreachable(f"{self.url} names one federation and lets into another; is it a coordinator?")
        self._transport.close()
        self._transport = Transport(self.url, reply.credential, self.journal.link, trust)
        self.save(joined(self.url, reply, before, trust.pin))
        self.journal.end_attempt()
        self.tell("joined", f"joined federation {federation.id} as {self.options.name}")

    def _require_same(self, before: Federation, federation: Federation) -> None:
        if before != federation:
            raise InputError(
                f"{self.journal.folder} belongs to federation {before.id}, but {self.url} serves "
                f"{federation.id}; use another state folder"
            )

    def _fingerprint(self, federation: Federation) -> str:
        return identity.fingerprint(federation, self.options, self.journal.folder / DIGESTS)

    def save(self, session: Session) -> None:
        """Make `session` the one that survives.

        Raises:
            Unwritable: the disk is full; all is as before.
        """
        self.journal.save(session)
        self._session = session
        self.heard_of(session.last_version)

    def heard_of(self, version: int) -> None:
        """Tell the application of another version: a newer one, or what a restored coordinator has."""
        if version != self._newest:
            self._newest = version
            self.tell("adapter", f"version {version} of the adapter is there", version=version)

    def drop(self, reason: str) -> None:
        """Give up the work in hand."""
        self.save(dropped(self.session))
        self.journal.clear_work()
        self.tell("refused", f"work dropped, {reason}")

    def close(self) -> None:
        """Hang up; the next `connect` makes a new connection."""
        self._checked = False
        if self._transport is not None:
            self._transport.close()
