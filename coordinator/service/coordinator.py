"""The coordinator proper: the pure engine joined to its store, its blobs and the aggregation thread.

Knows nothing of HTTP. Every method that acknowledges something returns only after it is on disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

from coordinator.adapters.ladder import Rung
from coordinator.adapters.serving import Serving
from coordinator.adapters.uploads import Uploads
from coordinator.engine import events
from coordinator.engine.engine import Engine
from coordinator.engine.state import Ration
from coordinator.merging.merger import Merger
from coordinator.privacy import ledger
from coordinator.service.caches import Assignments, Credentials
from coordinator.service.fault_log import Trouble
from coordinator.service.opening import buffered, recalled
from coordinator.service.process_limits import THREADS, trim_heap
from coordinator.service.status import Overview, SharedAnswer
from coordinator.settings import Settings
from coordinator.storage.blobs import Blobs
from coordinator.storage.store import DATABASE, Store
from coordinator.upkeep.collection import Collector
from coordinator.upkeep.data_folder import join_token, require_sound
from edge_sdk.core.errors import (
    AdapterError,
    BadUpdates,
    InputError,
    NotFound,
    OurFault,
    ProtocolError,
    TooLarge,
    Unauthorised,
)
from edge_sdk.core.flexlora import Decompose
from edge_sdk.core.messages import (
    PROTOCOL_VERSION,
    Ask,
    Assignment,
    Federation,
    Heartbeat,
    HeartbeatReply,
    JoinReply,
    JoinRequest,
    NotNow,
    Update,
    UpdateReply,
)
from edge_sdk.core.records import decode, encode, to_json
from edge_sdk.core.svd.decompose import decompose

log = logging.getLogger("coordinator")
Answer = TypeVar("Answer")
TICK_S = 0.5


class Coordinator:
    """One federation on one data folder. Create it in the event loop that will use it."""

    def __init__(self, folder: Path, settings: Settings, by: Decompose = decompose) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.blobs = Blobs(folder)
        except OSError as error:
            raise InputError(f"{folder}: no usable data folder ({error.strerror}); name another") from error
        self.store = Store(folder / DATABASE)
        self.federation = self._fixed_federation(settings, folder)
        self.privacy = settings.privacy
        ledger.open_ledger(self.store, settings.privacy, folder)
        self.collector = Collector(
            self.store, self.blobs, settings.storage.keep_versions, settings.policy.staleness_limit
        )
        require_sound(folder, self.store, self.blobs, self.collector.newest)
        self.collector.tidy()
        self.join_token = join_token(folder)
        steps = self.federation.training.steps
        self.engine = Engine(settings.policy, ration=self._restored_ration(), steps=steps)
        self._credentials, self._assignments = Credentials(self.store), Assignments(self.store)
        self.trouble = Trouble()
        self._seen: dict[str, float] = {}
        self._delivering: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by device
        self._tasks: set[asyncio.Task[None]] = set()
        self._collecting: asyncio.Task[None] | None = None
        self._expired: list[str] = []  # assignments whose end is not on disk yet
        self._restore()
        learnt = None if self.privacy else settings.admission
        self.uploads = Uploads(self.federation, self.store, self.blobs, learnt)
        self.serving = Serving(self.federation, self.store, self.blobs, self.collector.newest)
        self._status = SharedAnswer(self._status_text)
        self._taking_in = asyncio.Semaphore(THREADS // 2)  # the other threads are for the other routes
        self.merger = Merger(self.federation, self.store, self.blobs, settings.admission, by)

    # --- life ---

    def _fixed_federation(self, settings: Settings, folder: Path) -> Federation:
        """The federation of this folder; settings that contradict it are refused by name."""
        stored = self.store.meta("federation")
        if stored is None:
            made = settings.build(secrets.token_hex(8))
            self.store.set_meta("federation", encode(made).decode())
            return made
        federation = decode(Federation, stored)
        wanted = to_json(settings.build(federation.id, federation))
        for key, value in to_json(federation).items():
            if wanted[key] != value:
                raise InputError(
                    f"{folder} holds a federation with another {key}; restore that or use another folder"
                )
        return federation

    def _restore(self) -> None:
        """Tell the engine what is on disk."""
        now = self.now()
        done = self.engine.handle(recalled(self.store, now, time.time()), now)
        self._leave_out(effect for effect in done.effects if isinstance(effect, events.Decline))

    def _restored_ration(self) -> Ration | None:
        """How often each device may still take part; updates beyond a lowered budget are left out."""
        if self.privacy is None:
            return None
        ration = ledger.ration(self.store, self.privacy)
        over = ledger.over_ration(self.store, ration)
        for id in over:
            log.warning("update %s is left out: its device has no privacy budget left", id)
        self.store.reject_updates(dict.fromkeys(over, "its device had no privacy budget left"))
        return ration

    @staticmethod
    def now() -> float:
        """The engine's clock: seconds that never go backwards."""
        return time.monotonic()

    async def run(self) -> None:
        """Tick until cancelled, whatever fails: deadlines must come."""
        self._collect_soon()
        while True:
            try:
                self._apply(events.Tick())
                await self._note_expired()
                await asyncio.to_thread(self._credentials.refresh)
            except OurFault as error:
                self.trouble.log("tick", error)
            except Exception:
                log.exception("a tick failed; the next comes in %.1f s", TICK_S)
            await asyncio.sleep(TICK_S)

    async def close(self) -> None:
        """Wait for a running merge and close the store."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.store.close()

    def _apply(self, event: events.Event[Answer]) -> Answer:
        """Give the engine an event, do what it says, and return its answer to the caller."""
        done = self.engine.handle(event, self.now())
        for effect in done.effects:
            if isinstance(effect, events.Merge):
                task = asyncio.create_task(self._merge(effect))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            elif isinstance(effect, events.Expired):
                log.info("assignment %s of %s expired", effect.lease.assignment, effect.lease.device)
                self._expired.append(effect.lease.assignment)
            elif isinstance(effect, events.Published):
                self._collect_soon()
        return done.answer

    async def _note_expired(self) -> None:
        """Close the leases that ran out, all in one commit; what fails is noted with the next."""
        if expired := list(self._expired):
            await asyncio.to_thread(self.store.close_assignments, expired)
            del self._expired[: len(expired)]

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

    async def join(self, request: JoinRequest) -> JoinReply:
        """Enrol a device and give it a credential of its own."""
        if request.protocol != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the device speaks protocol {request.protocol}, this coordinator {PROTOCOL_VERSION}; "
                "update the older of the two"
            )
        self.federation.base.require(request.fingerprint)
        device, credential = secrets.token_hex(8), secrets.token_urlsafe(32)
        row = device, request.name[:80], _hash(credential), request.profile, time.time()
        await asyncio.to_thread(self.store.add_device, *row)
        self._credentials.add(_hash(credential), device)
        self._seen[device] = self.now()
        self._apply(events.Joined(device))
        log.info("device %s (%s) joined", device, request.name[:80])
        return JoinReply(device, credential, self.federation)

    async def ask(self, device: str, ask: Ask) -> Assignment | NotNow:
        """Grant work or say when to come back."""
        if ask.rank not in self.federation.ladder:
            raise ProtocolError(f"Ask.rank: {ask.rank} is not on the ladder {list(self.federation.ladder)}")
        if ask.carry_rank < 0:
            raise ProtocolError(f"Ask.carry_rank: {ask.carry_rank} is below 0")
        carry_rank = ask.carry_rank if self.federation.carries else 0
        answer = self._apply(events.Asked(device, ask.rank, secrets.token_hex(12), carry_rank))
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

    def bytes_arrived(self, device: str, id: str, size_bytes: int) -> None:
        """A piece of an upload is stored: the device is alive, however slow its link is."""
        self._apply(events.BytesArrived(device, id, size_bytes))

    async def deliver(self, device: str, id: str, update: Update) -> UpdateReply:
        """Check an uploaded adapter and acknowledge it. When this returns it will count exactly once.

        Raises:
            AdapterError, TooLarge: it cannot be merged, and its assignment is over. The device gets new work
                after a pause: the same work again would be refused again.
            StaleUpdate: it counts no more; says why, and which version to train from.
        """
        # One at a time of a device: the same request sent twice must not be answered before it is decided.
        async with self._delivering.setdefault(device, asyncio.Lock()):
            return await self._deliver(device, id, update)

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
        except (AdapterError, TooLarge) as error:
            log.warning("update %s of %s refused: %s", id, device, error)
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

    async def _merge(self, effect: events.Merge) -> None:
        """Do a merge off the event loop, publish it, and tell the engine how it went, whatever happened."""
        started = time.monotonic()
        try:
            outcome = await asyncio.to_thread(self._merged, effect)
        except OurFault as error:
            log.error("version %d: %s; its updates are kept for the next try", effect.version, error)
            outcome = events.MergeFailed()
        except Exception:
            log.exception("merging version %d failed; its updates are kept for the next try", effect.version)
            outcome = events.MergeFailed()
        if isinstance(outcome, events.Merged):
            took_s, count = time.monotonic() - started, len(effect.weights)
            log.info("version %d: %d updates, rank %d, %.1f s", outcome.version, count, outcome.rank, took_s)
        self._apply(outcome)

    def _merged(self, effect: events.Merge) -> events.Merged | events.MergeFailed:
        """A merge in a worker thread. Updates that turn out to be damaged are left out for good."""
        policy = self.engine.policy
        try:
            noise = self.privacy.noise(policy.buffer_size) if self.privacy else None
            version = self.merger.merge(effect, policy.server_learning_rate, noise)
        except BadUpdates as error:
            for update, reason in error.reasons.items():
                log.error("update %s: %s; it is left out", update, reason)
            self.store.reject_updates(error.reasons)
            return events.MergeFailed(tuple(error.reasons))
        except Exception:
            # The disk may have said no to a commit that it had done.
            if (there := self.store.version(effect.version)) is None:
                raise
            version = there
        finally:
            trim_heap()
        return events.Merged(version.version, version.rank)

    def _collect_soon(self) -> None:
        """Remove files that nobody needs any more, off the event loop, unless that is under way."""
        if self._collecting is None or self._collecting.done():
            self._collecting = asyncio.create_task(self._collect())
            self._tasks.add(self._collecting)
            self._collecting.add_done_callback(self._tasks.discard)

    async def _collect(self) -> None:
        try:
            found = await asyncio.to_thread(self.collector.run)
        except OurFault as error:
            self.trouble.log("collection", error)
        else:
            if found.files:
                log.info("collected %s", found)

    # --- views ---

    async def status(self) -> bytes:
        """The federation at a glance: a Status as JSON."""
        return await self._status.get()

    def _status_text(self) -> bytes:
        """That record as it is now. In a worker thread: with ten thousand devices it takes a while."""
        now = self.now()
        spent = ledger.worst(self.store, self.privacy.delta) if self.privacy else None
        overview = Overview(self.federation, self.engine, self.store)
        seen_s_ago = {device: now - seen for device, seen in self._seen.copy().items()}
        return encode(overview.status(seen_s_ago, self.uploads.norm_bound(), spent))


def _hash(token: str) -> str:
    """How a secret of 256 random bits is kept: one SHA-256 is enough, there is nothing to guess."""
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()
