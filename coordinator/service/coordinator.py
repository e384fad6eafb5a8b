"""The coordinator proper: what devices ask of it, answered by the pure engine and kept in the store.

Knows nothing of HTTP. Every method that acknowledges something returns only after it is on disk.
"""

from __future__ import annotations

import asyncio
import hashlib
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
from coordinator.limits.networks import network_of
from coordinator.merging.merger import Merger
from coordinator.privacy import ledger
from coordinator.service.background import Background
from coordinator.service.caches import Assignments
from coordinator.service.door import REASONS, Door
from coordinator.service.fault_log import FaultLog
from coordinator.service.opening import buffered, open_folder, recalled
from coordinator.service.other_runs import OtherRuns
from coordinator.service.process_limits import THREADS
from coordinator.service.refusals import Refusals
from coordinator.service.status import Overview, SharedAnswer, pages
from coordinator.service.trail import SHOWN, Trail
from coordinator.settings import Settings
from coordinator.upkeep import data_folder, folder_file
from edge_sdk.core.errors import (
    AdapterError,
    NotFound,
    OurFault,
    ProtocolError,
    StaleUpdate,
    TooLarge,
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
    Newest,
    NotNow,
    Update,
    UpdateReply,
)
from edge_sdk.core.ranges import MOST
from edge_sdk.core.records import encode
from edge_sdk.core.svd.decompose import decompose
from edge_sdk.system.terminal import logger

log = logger("coordinator")
Answer = TypeVar("Answer")
STANDING_RETRY_S = 30.0  # how often a device asks that waits for its host's word


class Coordinator:
    """One federation on one data folder. Create it in the event loop that will use it."""

    def __init__(self, folder: Path, settings: Settings, by: Decompose = decompose) -> None:
        opened = open_folder(folder, settings)
        self.folder, self.federation, self.store = folder, opened.federation, opened.store
        self.run_name, self.privacy = opened.run.name, settings.privacy
        self.faults, self.refusals = FaultLog(), Refusals()
        self.limits = settings.limits
        self.allowances = Allowances(settings.limits, self.federation.heartbeat_s)
        self.disk = FreeDisk(folder, settings.limits.least_free_bytes)
        self._other_runs = OtherRuns(self.store, self.faults)
        steps = self.federation.training.steps
        self.engine = Engine(settings.policy, ration=opened.ration, steps=steps)
        self.trail = Trail(self.store.members)
        self.door = Door(folder, self.store, settings.joining, self.trail, self.now)
        self._assignments = Assignments(self.store)
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

    @property
    def join_token(self) -> str:
        """By which devices of this machine join."""
        return data_folder.join_token(self.folder)

    @property
    def host_token(self) -> str:
        """For what only the host may see."""
        return data_folder.host_token(self.folder)

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

    async def _every_tick(self) -> None:
        for device in await self.door.tick():
            self._apply(events.Barred(device))
        await asyncio.to_thread(self.refusals.flush)
        await asyncio.to_thread(self.disk.look)

    async def close(self) -> None:
        """Wait for a running merge and close the store."""
        await self._background.close()
        self.refusals.flush(everything=True)
        try:
            self.door.write_seen()
            self.trail.flush(everything=True)
        except OurFault as error:
            self.faults.log("audit log", error)
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

    async def join(self, request: JoinRequest, token: str, address: str) -> JoinReply:
        """Enrol a device and give it a credential of its own.

        Raises:
            Unauthorised: by this token nobody is let in; says why.
            ProtocolError, BaseMismatch: it speaks another protocol, or has another base model.
            TooLarge, FederationFull, TooOften, DiskFull: a limit of the host's.
        """
        if request.protocol != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the device speaks protocol {request.protocol}, this coordinator {PROTOCOL_VERSION}; "
                "update the older of the two"
            )
        self.federation.base.require(request.fingerprint)
        self.disk.take()
        enrolled = self.door.count + self._joining
        self.allowances.join(network_of(address), enrolled, len(encode(request.profile)))
        self._joining += 1
        try:
            device, credential = await self.door.join(request, token, address)
        finally:
            self._joining -= 1
        self._apply(events.Joined(device))
        return JoinReply(device, credential, self.federation, self.run_name)

    async def leave(self, device: str, address: str) -> None:
        """A device gives its membership back; what it handed in until now still counts."""
        await self.door.leave(device, address)  # a lease in hand ends by its time; Barred would drop updates

    def newest(self) -> Newest:
        """Which version there is by now."""
        state = self.engine.state
        return Newest(state.version, state.version_rank, self.store.start(state.version))

    async def ask(self, device: str, ask: Ask) -> Assignment | NotNow:
        """Grant work or say when to come back."""
        if ask.rank not in self.federation.ladder:
            raise ProtocolError(f"Ask.rank: {ask.rank} is not on the ladder {list(self.federation.ladder)}")
        if reason := REASONS.get(self.door.standing(device)):
            return NotNow(STANDING_RETRY_S, reason)
        carry_rank = ask.carry_rank if self.federation.carries else 0
        elsewhere = await self._other_runs.heard(device, ask.run)
        # One at a time of a device: the disk must hear of its leases in the order in which they were granted.
        async with self._asking.setdefault(device, asyncio.Lock()):
            answer = await self._ask(device, ask.rank, carry_rank)
        return replace(answer, elsewhere=elsewhere, renew=self.door.must_renew(device))

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
        if self.door.standing(device) != "member":
            return HeartbeatReply("abandon")
        return HeartbeatReply(
            self._apply(events.Beat(device, assignment, version, beat.steps_done)).directive
        )

    def require_assignment(self, device: str, id: str) -> Assignment:
        """An assignment of this device, open or expired."""
        assignment = self._assignments.of(id, device)
        if assignment is None:
            raise NotFound(f"assignment {id[:80]} is not one of this device's")
        return assignment

    def require_counts(self, device: str) -> None:
        """Raise StaleUpdate for a device whose work does not count at present."""
        if reason := REASONS.get(self.door.standing(device)):
            raise StaleUpdate(f"{reason}; its work does not count", current_version=self.engine.state.version)

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
        self.allowances.uploaded(device, size_bytes / self.uploads.cap(assignment), begins=at == 0)
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
        self.require_counts(device)
        if self.uploads.is_known(id, update):
            return UpdateReply(id, self.engine.state.version)
        self.uploads.check_claims(assignment, update)
        offer = self._apply(events.Offered(device, id, assignment.version))
        if isinstance(offer, events.Decline):
            raise offer.error
        try:
            async with self._taking_in:
                stored, fresh = await asyncio.to_thread(self.uploads.take_in, device, assignment, update)
        except (AdapterError, TooLarge) as error:
            self.trail.add("update refused", device, self.door.address_of(device), str(error))
            await asyncio.to_thread(self.store.refuse, device, id, str(error)[:SHOWN])
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
        seen_s_ago = {device: now - seen for device, seen in self.door.seen_at().items()}
        status = overview.status(seen_s_ago, self._examination.norm_bound(), spent)
        status = replace(status, bad_requests=min(self.refusals.count, MOST))
        return pages(status, self.limits.status_devices)
