"""Who comes in: join tokens and invitations, credentials that are renewed, and how each device stands.

What every request asks is answered from memory. Changes that another process makes on the folder, as
`edge-coordinator revoke` does, are heard of at the next tick.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.service.trail import Trail
from coordinator.settings import Joining
from coordinator.storage.members import Offered
from coordinator.storage.rows import NewMember, Standing
from coordinator.storage.store import Store
from coordinator.upkeep import data_folder
from edge_sdk.core.errors import NotFound, Unauthorised
from edge_sdk.core.messages import JoinRequest, NewCredential
from edge_sdk.core.words import printable
from edge_sdk.system.terminal import logger

log = logger("coordinator")
SEEN_S = 30.0  # how often it is written down who was heard of
DAY_S = 86400.0
WAITING = "the host has not approved this device yet"
SUSPENDED = "the host has suspended this device"
REASONS: dict[Standing, str] = {"waiting": WAITING, "suspended": SUSPENDED}
OUT: tuple[Standing, ...] = ("suspended", "revoked")  # by the host: who left gave what it gave


class Door:
    """Belongs to one event loop. `clock`: seconds that never go backwards."""

    def __init__(
        self,
        folder: Path,
        store: Store,
        joining: Joining,
        trail: Trail,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._store, self._joining = folder, store, joining
        self._trail, self._clock = trail, clock
        self._members = store.members
        self._data_version = store.data_version()
        self._host_hash = hash_of(data_folder.host_token(folder))
        self._seen: dict[str, tuple[float, str]] = {}  # device -> when, from where
        self._unwritten: dict[str, tuple[float, str]] = {}  # since they were written last
        self._seen_written_at = clock()
        self._first_used: dict[str, Offered] = {}  # credentials that take the place of those before them
        self._known = self._read()
        self._added: dict[str, str] = {}  # credentials since the last tick began
        self._reads, self._must_read = 0, False

    def _read(self) -> _Known:
        return _Known(
            hash_of(data_folder.join_token(self._folder)),
            self._members.credentials(),
            {one.credential_hash: one for one in self._members.offered()},
            self._members.standings(),
            self._members.credential_times(),
        )

    # --- who asks ---

    def authenticate(self, token: str, address: str) -> str:
        """The device that holds this credential.

        Raises:
            Unauthorised: nobody does.
        """
        hashed = hash_of(token)
        device = self._known.devices.get(hashed)
        if device is None:
            self._trail.add("wrong credential", address=address)
            raise Unauthorised("this credential or token is not known here; join again with an invitation")
        if offered := self._known.offered.pop(hashed, None):
            self._first_used[device] = offered
        self._seen[device] = self._unwritten[device] = self._clock(), address
        return device

    @property
    def count(self) -> int:
        """About how many devices take part: one whose credential is being renewed counts twice."""
        return len(self._known.devices)

    def is_invited(self, token: str) -> bool:
        """Whether somebody may look at the federation with this token, to join it: it has not expired."""
        hashed = hash_of(token)
        if hmac.compare_digest(hashed, self._known.join_hash):
            return True
        invitation = None if hashed in self._known.devices else self._members.invited_by(hashed)
        return invitation is not None and time.time() < invitation.expires_at

    def require_host(self, token: str, address: str, asked: str) -> None:
        """Raise Unauthorised unless this is the host's own credential; note who looked at what."""
        if not hmac.compare_digest(hash_of(token), self._host_hash):
            self._trail.add("wrong host token", address=address, detail=asked)
            raise Unauthorised(
                f"wrong host token; the host finds it in {data_folder.HOST_TOKEN_FILE} of the data folder"
            )
        self._trail.add("host's route read", address=address, detail=asked)

    def require_invited(self, token: str, address: str) -> str | None:
        """The id of the invitation that has this token; None for the folder's join token.

        Raises:
            Unauthorised: none has, or it has expired. Whether it lets one more device in is another question:
                a device whose answer was lost comes with one that is used up.
        """
        hashed = hash_of(token)
        if hmac.compare_digest(hashed, self._known.join_hash):
            return None
        invitation = self._members.invited_by(hashed)
        if invitation is None:
            self._trail.add("wrong join token", address=address)
            raise Unauthorised("wrong join token; ask the host for an invitation")
        if time.time() >= invitation.expires_at:
            self._trail.add("join refused", address=address, detail=f"invitation {invitation.id} is over")
            raise Unauthorised("this invitation has expired; ask the host for another")
        return invitation.id

    def standing(self, device: str) -> Standing:
        """How a device stands."""
        return self._known.standings.get(device, "member")

    def require_member(self, device: str) -> None:
        """Raise NotFound for a device that does not take part at present."""
        if reason := REASONS.get(self.standing(device)):
            raise NotFound(reason)

    def must_renew(self, device: str) -> bool:
        """Whether its credential is older than the host wants any to be."""
        age_s = time.time() - self._known.credential_at.get(device, time.time())
        return age_s > self._joining.credential_days * DAY_S

    def seen_at(self) -> dict[str, float]:
        """Device -> when it was heard of last, by the clock, since the start."""
        return {device: at for device, (at, _) in self._seen.copy().items()}

    def address_of(self, device: str) -> str:
        """Where a device was heard of last; "" for one that was not since the start."""
        return self._seen[device][1] if device in self._seen else ""

    # --- joining and leaving ---

    async def join(self, request: JoinRequest, token: str, address: str) -> tuple[str, str]:
        """Let a device in: its id and its credential, of which only the hash is kept.

        Raises:
            Unauthorised: by this token nobody is let in any more; says why.
        """
        invitation = self.require_invited(token, address)
        credential, name = secrets.token_urlsafe(32), printable(request.name, 80)
        standing: Standing = "waiting" if self._joining.approve else "member"
        attempt = hash_of(request.attempt) if request.attempt else None
        new = NewMember(
            secrets.token_hex(8),
            name,
            hash_of(credential),
            request.profile,
            standing,
            invitation,
            attempt,
            address,
        )
        reads = self._reads
        try:
            device = await asyncio.to_thread(self._members.join, new, time.time())
        except Unauthorised as error:
            self._trail.add("join refused", address=address, detail=f"{error} (invitation {invitation})")
            raise
        if device != new.id:
            self._drop_credentials(device)
        elif standing != "member":
            self._known.standings[device] = standing
        self._add_credential(new.credential_hash, device)
        self._known.credential_at[device] = time.time()
        self._seen[device] = self._clock(), address
        self._must_read |= self._reads != reads  # another process may have put it out meanwhile
        by = f"invitation {invitation}" if invitation else "the join token"
        self._trail.add("joined" if device == new.id else "joined again", device, address, f"{name}, by {by}")
        log.info("device %s (%s) joined%s", device, name, f"; {WAITING}" if standing == "waiting" else "")
        return device, credential

    async def renew(self, device: str, address: str) -> NewCredential:
        """Another credential for a device; its present one holds until that one is used."""
        credential = secrets.token_urlsafe(32)
        offered = Offered(device, hash_of(credential))
        await asyncio.to_thread(self._members.offer_credential, offered)
        for hashed, other in list(self._known.offered.items()):
            if other.device == device:
                del self._known.offered[hashed]
                self._known.devices.pop(hashed, None)
        self._known.offered[offered.credential_hash] = offered
        self._add_credential(offered.credential_hash, device)
        self._trail.add("credential renewed", device, address)
        return NewCredential(credential)

    async def leave(self, device: str, address: str) -> None:
        """A device gives its membership back. Its credential is void when this returns."""
        await asyncio.to_thread(self._members.set_standing, device, "left", "its device left")
        self._known.standings[device] = "left"
        self._drop_credentials(device)
        self._trail.add("left", device, address)
        log.info("device %s left", device)

    def _add_credential(self, hashed: str, device: str) -> None:
        self._known.devices[hashed] = self._added[hashed] = device

    def _drop_credentials(self, device: str) -> None:
        for known in (self._known.devices, self._added):
            for hashed in [hashed for hashed, who in known.items() if who == device]:
                del known[hashed]

    # --- at every tick ---

    async def tick(self) -> list[str]:
        """Write down what is due, and hear of what another process has changed; devices that are out since.

        Raises:
            DiskFull, InternalError: what was not written is written with the next tick.
        """
        self._added = {}
        await self._take_over()
        if self._clock() - self._seen_written_at >= SEEN_S:
            await asyncio.to_thread(self.write_seen)
        await asyncio.to_thread(self._trail.flush)
        known = await asyncio.to_thread(self._changed)
        if known is None:
            return []
        before = self._known
        # Who joined while the rows were read may not be among them.
        self._known = replace(known, devices=known.devices | self._added)
        self._must_read, self._reads = bool(self._added), self._reads + 1
        now = self._known.standings
        return [d for d, standing in now.items() if standing in OUT and before.standings.get(d) != standing]

    def _changed(self) -> _Known | None:
        """What the disk says by now, in a thread; None if no other process has written to it."""
        data_version = self._store.data_version()
        if data_version == self._data_version and not self._must_read:
            return None
        self._data_version = data_version
        return self._read()

    def write_seen(self) -> None:
        """Write down who was heard of, for whoever looks at the folder. In a thread."""
        self._seen_written_at, seen, self._unwritten = self._clock(), self._unwritten, {}
        now, clock = time.time(), self._clock()
        if seen:
            self._members.note_seen((d, now - (clock - at), address) for d, (at, address) in seen.items())

    async def _take_over(self) -> None:
        """Credentials that were used once are the only ones of their devices from now on."""
        if not self._first_used:
            return
        used, self._first_used = self._first_used, {}
        await asyncio.to_thread(self._members.take_over, used.values(), time.time())
        kept = {one.credential_hash for one in used.values()}
        devices = {h: d for h, d in self._known.devices.items() if d not in used or h in kept}
        at = self._known.credential_at | dict.fromkeys(used, time.time())
        self._known = replace(self._known, devices=devices, credential_at=at)


@dataclass(frozen=True)
class _Known:
    """What is kept in memory of the rows."""

    join_hash: str
    devices: dict[str, str]  # hash of a credential -> device
    offered: dict[str, Offered]  # by hash: credentials that were not used yet
    standings: dict[str, Standing]  # of those that are no members
    credential_at: dict[str, float]


def hash_of(token: str) -> str:
    """How a secret of 128 random bits or more is kept: one SHA-256 is enough, there is nothing to guess."""
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()
