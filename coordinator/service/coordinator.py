"""The coordinator proper: what devices ask of it, answered by the pure engine and kept in the store.

Knows nothing of HTTP. Every method that acknowledges something returns only after it is on disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

from coordinator.adapters.examination import Examination
from coordinator.adapters.ladder import Rung
from coordinator.adapters.serving import Serving
from coordinator.adapters.uploads import Uploads
from coordinator.engine import events
from coordinator.engine.engine import Engine
from coordinator.limits.allowances import Allowances
from coordinator.limits.free_disk import FreeDisk
from coordinator.merging.merger import Merger
from coordinator.privacy import ledger
from coordinator.service.background import Background
from coordinator.service.caches import Assignments, Credentials
from coordinator.service.fault_log import FaultLog
from coordinator.service.opening import buffered, open_folder, recalled
from coordinator.service.other_runs import OtherRuns
from coordinator.service.process_limits import THREADS
from coordinator.service.refusals import Refusals
from coordinator.service.status import Overview, SharedAnswer, pages
from coordinator.settings import Settings
from coordinator.upkeep import folder_file
from edge_sdk.core.errors import (
    AdapterError,
    NotFound,
    ProtocolError,
    StaleUpdate,
    TooLarge,
    Unauthorised,
)
from edge_sdk.core.flexlora import Decompose
from edge_sdk.core.messages import (
    PROTOCOL_VERSION,
    Ask,
    Assignment,
    Heartbeat,
    HeartbeatReply,
    JoinReply,
    JoinRequest,
    NotNow,
    Update,
    UpdateReply,
)
from edge_sdk.core.ranges import MOST
from edge_sdk.core.records import encode
from edge_sdk.core.svd.decompose import decompose
from edge_sdk.core.words import printable
from edge_sdk.system.terminal import logger

log = logger("coordinator")
Answer = TypeVar("Answer")


class Coordinator:
    """One federation on one data folder. Create it in the event loop that will use it."""

    def __init__(self, folder: Path, settings: Settings, by: Decompose = decompose) -> None:
        opened = open_folder(folder, settings)
        self.federation, self.store, self.join_token = opened.federation, opened.store, opened.join_token
        self.run_name, self.privacy = opened.run.name, settings.privacy
        self.faults, self.refusals = FaultLog(), Refusals()
        self.limits = settings.limits
        self.allowances = Allowances(settings.limits, self.federation.heartbeat_s)
        self.disk = FreeDisk(folder, settings.limits.least_free_bytes)
        self._other_runs = OtherRuns(self.store, self.faults)
        steps = self.federation.training.steps
        self.engine = Engine(settings.policy, ration=opened.ration, steps=steps)
        self._credentials, self._assignments = Credentials(self.store), Assignments(self.store)
        self._seen: dict[str, float] = {}
        self._asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by device
        self._joining = 0  # devices that are about to be stored
        self._delivering: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # likewise
        self._restore()
        noise = self.privacy.noise(settings.policy.buffer_size) if self.privacy else None
        eta = settings.policy.server_learning_rate
        merger = Merger(self.federation, self.store, opened.blobs, settings.admission, eta, noise, by)
        chosen = None if self.privacy else settings.admission
        self._examination = Examination(self.federation, self.store, opened.blobs, chosen, merger.learnt)
        self.uploads = Uploads(self.federation, self.store, opened.blobs, self._examination)
        self.serving = Serving(
            self.federation, self.store, opened.blobs, opened.collector.newest, self.disk.take
        )
        make_version = partial(merger.make, prepare=self.serving.prepare)
        self._status = SharedAnswer(self._status_pages)
        self._taking_in = asyncio.Semaphore(THREADS // 2)  # the other threads are for the other routes
        note_version = partial(folder_file.note_version, folder, self.federation.id, opened.run)
        self._background = Background(
            self.store, make_version, opened.collector, self.faults, self._apply, note_version
        )

    # --- life ---

    def _restore(self) -> None:
        """Tell the engine what is on disk."""
        now = self.now()
        done = self.engine.handle(recalled(self.store, now, time.time()), now)
        self._leave_out(effect for effect in done.effects if isinstance(effect, events.Decline))

    @staticmethod
    def now() -> float:
        """The engine's clock: seconds that never go backwards."""
        return time.monotonic()

    async def run(self) -> None:
        """Keep the federation going until cancelled."""
        await self._background.run(every_tick=self._every_tick)

    def _every_tick(self) -> None:
        self._credentials.refresh()
        self.refusals.flush()
        self.disk.look()

    async def close(self) -> None:
        """Wait for a running merge and close the store."""
        await self._background.close()
        self.refusals.flush(everything=True)
        self.store.close()

    def _apply(self, event: events.Event[Answer]) -> Answer:
        """Give the engine an event, begin what it wants done, and return its answer."""
        done = self.engine.handle(event, self.now())
        self._background.take_up(done.effects)
        return done.answer

    def _leave_out(self, declined: Iterable[events.Decline]) -> None:
        """Keep stored updates that the engine declined out of all versions."""
        if reasons := {one.update: str(one.error) for one in declined}:
            self.store.reject_updates(reasons)

    # --- devices ---

    def authenticate(self, token: str) -> str:
        """The device that holds this credential.

        Raises:
            Unauthorised: nobody does.
        """
        device = self._credentials.device_of(_hash(token))
        if device is None:
            raise Unauthorised("this credential is not known here; join again with the join token")
        self._seen[device] = self.now()
        return device

    def require_join_token(self, token: str) -> None:
        """Raise Unauthorised unless this is the federation's join token."""
        if not hmac.compare_digest(_hash(token), _hash(self.join_token)):
            raise Unauthorised("wrong join token; the host finds it in the coordinator's data folder")

    async def join(self, request: JoinRequest, network: str) -> JoinReply:
        """Enrol a device and give it a credential of its own. `network`: of the address that it joins from.

        Raises:
            BaseMismatch, ProtocolError: it cannot take part.
            TooLarge, FederationFull, TooOften, DiskFull: a limit of the host's.
        """
        if request.protocol != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the device speaks protocol {request.protocol}, this coordinator {PROTOCOL_VERSION}; "
                "update the older of the two"
            )
        self.federation.base.require(request.fingerprint)
        self.disk.take()
        enrolled = len(self._credentials) + self._joining
        self.allowances.join(network, enrolled, len(encode(request.profile)))
        device, credential = secrets.token_hex(8), secrets.token_urlsafe(32)
        name = printable(request.name, 80)
        row = device, name, _hash(credential), request.profile, time.time()
        self._joining += 1
        try:
            await asyncio.to_thread(self.store.add_device, *row)
        finally:
            self._joining -= 1
        self._credentials.add(_hash(credential), device)
        self._seen[device] = self.now()
        self._apply(events.Joined(device))
        log.info("device %s (%s) joined", device, name)
        return JoinReply(device, credential, self.federation, self.run_name)

    async def ask(self, device: str, ask: Ask) -> Assignment | NotNow:
        """Grant work or say when to come back."""
        if ask.rank not in self.federation.ladder:
            raise ProtocolError(f"Ask.rank: {ask.rank} is not on the ladder {list(self.federation.ladder)}")
        carry_rank = ask.carry_rank if self.federation.carries else 0
        elsewhere = await self._other_runs.heard(device, ask.run)
        # One at a time of a device: the disk must hear of its leases in the order in which they were granted.
        async with self._asking.setdefault(device, asyncio.Lock()):
            return replace(await self._ask(device, ask.rank, carry_rank), elsewhere=elsewhere)

    async def _ask(self, device: str, rank: int, carry_rank: int) -> Assignment | NotNow:
        answer = self._apply(events.Asked(device, rank, secrets.token_hex(12), carry_rank))
        if isinstance(answer, events.Wait):
            return NotNow(answer.retry_after_s, answer.reason)
        assignment = self._assignment(answer.lease)
        if self._assignments.of(assignment.id, device) is None:
            await asyncio.to_thread(self.store.add_assignment, device, assignment, time.time())
            self._assignments.add(device, assignment)
        return assignment

    def _assignment(self, lease: events.Lease) -> Assignment:
        """The wire record of a lease: the same each time, but for the time left."""
        return Assignment(
            id=lease.assignment,
            version=lease.version,
            rank=lease.rank,
            carry_rank=lease.carry_rank,
            steps=lease.steps,
            seed=int(hashlib.sha256(lease.assignment.encode()).hexdigest()[:8], 16),
            expires_in_s=max(0.0, lease.expires_at - self.now()),
            start=self.store.start(lease.version),
            run=self.run_name,
        )

    def heartbeat(self, device: str, assignment: str, beat: Heartbeat) -> HeartbeatReply:
        """Note progress; the answer says whether to go on."""
        version = self.require_assignment(device, assignment).version
        return HeartbeatReply(
            self._apply(events.Beat(device, assignment, version, beat.steps_done)).directive
        )

    def require_assignment(self, device: str, id: str) -> Assignment:
        """An assignment of this device, open or expired."""
        assignment = self._assignments.of(id, device)
        if assignment is None:
            raise NotFound(f"assignment {id[:80]} is not one of this device's")
        return assignment

    # --- uploads ---

    async def append(self, device: str, assignment: Assignment, at: int, pieces: Sequence[bytes]) -> int:
        """Store pieces of an upload at an offset; the new end. The device is alive, however slow its link is.

        Raises:
            TooOften: the device has sent much and handed in nothing.
            OffsetConflict, TooLarge, DiskFull, InternalError: as `Uploads.append`.
        """
        size_bytes = sum(map(len, pieces))
        self.require_upload(device)
        self.disk.take(size_bytes)
        self.allowances.uploaded(device, size_bytes / self.uploads.cap(assignment))
        end = await asyncio.to_thread(self.uploads.append, assignment, at, pieces)
        self._apply(events.BytesArrived(device, assignment.id, end - at))
        return end

    def require_upload(self, device: str) -> None:
        """Raise TooOften or DiskFull for a device that had better not send anything now."""
        self.allowances.require_useful(device)
        self.disk.take()

    async def deliver(self, device: str, id: str, update: Update) -> UpdateReply:
        """Check an uploaded adapter and acknowledge it. When this returns it will count exactly once.

        Raises:
            AdapterError, TooLarge: it cannot be merged, and its assignment is over. The device gets new work
                after a pause: the same work again would be refused again.
            StaleUpdate: it counts no more; says why, and which version to train from.
        """
        # One at a time of a device: the same request sent twice must not be answered before it is decided.
        async with self._delivering.setdefault(device, asyncio.Lock()):
            try:
                reply = await self._deliver(device, id, update)
            except StaleUpdate:  # it could count when it was begun
                self.allowances.handed_in(device)
                raise
        self.allowances.handed_in(device)
        return reply

    async def _deliver(self, device: str, id: str, update: Update) -> UpdateReply:
        assignment = self.require_assignment(device, id)
        if self.uploads.is_known(id, update):
            return UpdateReply(id, self.engine.state.version)
        self.uploads.check_claims(assignment, update)
        offer = self._apply(events.Offered(device, id, assignment.version))
        if isinstance(offer, events.Decline):
            raise offer.error
        try:
            async with self._taking_in:
                stored, fresh = await asyncio.to_thread(self.uploads.take_in, device, assignment, update)
        except (AdapterError, TooLarge):
            await asyncio.to_thread(self.store.refuse, device, id)
            self._apply(events.Refused(device, id))
            raise
        if stored.factor < 1.0:
            log.warning("update %s of %s is merged by %.2g of its change", id, device, stored.factor)
        if fresh:
            declined = self._apply(events.Stored(buffered(stored), update.steps))
            if declined:  # a round ended meanwhile
                await asyncio.to_thread(self._leave_out, [declined])
                raise declined.error
        return UpdateReply(id, self.engine.state.version)

    # --- versions ---

    async def adapter(self, version: int, rung: Rung) -> Path:
        """The file that a device of `rank` starts `version` from."""
        self.require_version(version, rung.rank)
        return await self.serving.adapter(version, rung)

    def require_version(self, version: int, rank: int) -> None:
        """Raise NotFound for a version or rank that is not served."""
        self.serving.require(version, rank, self.engine.state.version)

    # --- views ---

    async def status(self, page: int = 0) -> bytes:
        """The federation at a glance: a Status as JSON, with one page of its devices.

        Raises:
            NotFound: there are fewer pages.
        """
        made = await self._status.get()
        if page >= len(made):
            raise NotFound(f"page {page} of the status: there are {len(made)}, counted from 0")
        return made[page]

    def _status_pages(self) -> tuple[bytes, ...]:
        """All pages as they are now. In a worker thread: with ten thousand devices it takes a while."""
        now = self.now()
        spent = ledger.worst(self.store, self.privacy.delta) if self.privacy else None
        overview = Overview(self.federation, self.engine, self.store)
        seen_s_ago = {device: now - seen for device, seen in self._seen.copy().items()}
        status = overview.status(seen_s_ago, self._examination.norm_bound(), spent)
        status = replace(status, bad_requests=min(self.refusals.count, MOST))
        return pages(status, self.limits.status_devices)


def _hash(token: str) -> str:
    """How a secret of 256 random bits is kept: one SHA-256 is enough, there is nothing to guess."""
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()
