"""Uploads on their way in: bounded places, slow senders aside, nothing lost when one breaks off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.web import intake
from coordinator.web.intake import Intake, receive
from edge_sdk.core.errors import Busy


class Sender:
    """A body that comes as the script says: bytes, seconds of silence, or an error at the end."""

    def __init__(self, *script: bytes | float | Exception) -> None:
        self._script = list(script)
        self._silent_until: float | None = None  # by the loop's clock; who waits may look in between

    async def readany(self) -> bytes:
        while self._script:
            first = self._script[0]
            if isinstance(first, float):
                now = asyncio.get_running_loop().time()
                self._silent_until = self._silent_until or now + first
                await asyncio.sleep(self._silent_until - now)
                self._silent_until = None
                self._script.pop(0)
                continue
            self._script.pop(0)
            if isinstance(first, Exception):
                raise first
            return first
        return b""


class Disk:
    """What was appended, and in how many calls."""

    def __init__(self) -> None:
        self.content = b""
        self.calls = 0

    async def append(self, offset: int, pieces: Sequence[bytes]) -> int:
        assert offset == len(self.content)
        await asyncio.sleep(0)
        self.content += b"".join(pieces)
        self.calls += 1
        return len(self.content)


def taken_in(sender: Sender, disk: Disk) -> int:
    async def run() -> int:
        with Intake().place(None) as place:
            return await receive(sender, 0, disk.append, place)

    return asyncio.run(run())


@given(st.lists(st.binary(min_size=1, max_size=300_000), max_size=12))
def test_all_bytes_arrive_in_order_in_few_writes(pieces: list[bytes]) -> None:
    disk = Disk()
    whole = b"".join(pieces)
    assert taken_in(Sender(*pieces), disk) == len(whole)
    assert disk.content == whole
    assert disk.calls <= len(whole) // intake.PIECE_BYTES + 1


def test_what_came_before_a_cut_is_handed_over() -> None:
    disk = Disk()
    with pytest.raises(ConnectionError):
        taken_in(Sender(b"x" * intake.PIECE_BYTES, b"abc", ConnectionError("cut")), disk)
    assert disk.content == b"x" * intake.PIECE_BYTES + b"abc"


def test_bytes_do_not_wait_for_a_silent_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "PIECE_S", 0.05)
    monkeypatch.setattr(intake, "SILENCE_S", 0.5)
    disk = Disk()
    with pytest.raises(TimeoutError):
        taken_in(Sender(b"abc", 30.0), disk)
    assert disk.content == b"abc"


def test_a_failing_disk_is_told() -> None:
    async def append(offset: int, pieces: Sequence[bytes]) -> int:
        raise OSError("the disk is gone")

    async def run() -> None:
        with Intake().place(None) as place:
            await receive(Sender(b"x" * intake.PIECE_BYTES, b"y"), 0, append, place)

    with pytest.raises(OSError, match="gone"):
        asyncio.run(run())


@contextlib.asynccontextmanager
async def holding(doors: Intake, connection: Any = None) -> AsyncIterator[None]:
    with doors.place(connection) as place:
        await place.take()
        yield


def crowd(work: Callable[[Intake], Coroutine[Any, Any, None]], places: int, queue: int) -> None:
    async def run() -> None:
        await work(Intake(places, queue))

    asyncio.run(run())


def test_places_are_bounded_and_the_rest_waits_or_is_told_to_come_back() -> None:
    async def work(doors: Intake) -> None:
        inside, most, done = 0, 0, asyncio.Event()

        async def one() -> None:
            nonlocal inside, most
            async with holding(doors):
                inside, most = inside + 1, max(most, inside + 1)
                await done.wait()
                inside -= 1

        tasks = [asyncio.create_task(one()) for _ in range(2 + 3)]
        await asyncio.sleep(0.05)
        assert inside == 2
        with pytest.raises(Busy) as told:
            doors.require_room()  # three wait: a HEAD says so before any bytes come
        assert intake.RETRY_S <= told.value.details["retry_after_s"] <= 2 * intake.RETRY_S
        tasks += [asyncio.create_task(one()) for _ in range(9)]  # whose bytes are on the way already
        await asyncio.sleep(0.05)
        with pytest.raises(Busy):
            await one()
        done.set()
        await asyncio.gather(*tasks)
        assert (inside, most) == (0, 2)
        doors.require_room()

    crowd(work, places=2, queue=3)


def test_slow_senders_keep_no_fast_one_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slow ones on two places would take a minute; a fast one is through long before."""
    monkeypatch.setattr(intake, "SLOW_AFTER_S", 0.05)
    monkeypatch.setattr(intake, "PIECE_S", 0.2)

    async def work(doors: Intake) -> None:
        async def send(sender: Sender, disk: Disk) -> int:
            with doors.place(None) as place:
                return await receive(sender, 0, disk.append, place)

        drops: list[bytes | float | Exception] = [b"drop", 0.1] * 600
        slow = [asyncio.create_task(send(Sender(*drops), Disk())) for _ in range(2)]
        await asyncio.sleep(0.01)
        disk = Disk()
        async with asyncio.timeout(20.0):
            await send(Sender(*[b"x" * intake.PIECE_BYTES] * 4), disk)
        assert len(disk.content) == 4 * intake.PIECE_BYTES
        assert not any(task.done() for task in slow)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)

    crowd(work, places=2, queue=3)


def test_a_slow_sender_that_becomes_fast_needs_a_place_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "SLOW_AFTER_S", 0.01)
    monkeypatch.setattr(intake, "PIECE_S", 0.05)

    async def work(doors: Intake) -> None:
        disk = Disk()
        big = b"x" * intake.PIECE_BYTES

        async def send() -> int:
            with doors.place(None) as place:
                return await receive(Sender(b"a", 0.2, b"b", big, big, big), 0, disk.append, place)

        task = asyncio.create_task(send())
        await asyncio.sleep(0.1)  # by now it is known as slow
        async with holding(doors):  # so there is a place
            await asyncio.sleep(0.3)
            assert len(disk.content) < 2 + 3 * len(big)  # and it does not read on at full speed without one
        assert await task == 2 + 3 * len(big)

    crowd(work, places=1, queue=3)


class Connection:
    """A transport that notes what it is told."""

    def __init__(self) -> None:
        self.reading = True

    def is_reading(self) -> bool:
        return self.reading

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


def test_who_waits_is_not_read() -> None:
    async def work(doors: Intake) -> None:
        connection: Any = Connection()

        async def second() -> None:
            async with holding(doors, connection):
                assert connection.reading

        async with holding(doors):
            task = asyncio.create_task(second())
            await asyncio.sleep(0.02)
            assert not connection.reading
        await task

    crowd(work, places=1, queue=3)


@pytest.mark.parametrize("before", [[], [b"x" * intake.PROOF_BYTES], [b"x" * intake.PIECE_BYTES]])
def test_an_upload_of_which_nothing_comes_has_no_place(
    monkeypatch: pytest.MonkeyPatch, before: list[bytes | float | Exception]
) -> None:
    """Neither one that was announced, nor one that was fast until now."""
    monkeypatch.setattr(intake, "PIECE_S", 0.1)
    monkeypatch.setattr(intake, "SLOW_AFTER_S", 0.05)

    async def work(doors: Intake) -> None:
        async def send() -> None:
            with doors.place(None) as place:
                await receive(Sender(*before, 30.0), 0, Disk().append, place)

        silent = [asyncio.create_task(send()) for _ in range(5)]
        await asyncio.sleep(0.05)
        async with asyncio.timeout(10.0), holding(doors):
            doors.require_room()
        for task in silent:
            task.cancel()
        await asyncio.gather(*silent, return_exceptions=True)

    crowd(work, places=1, queue=30)


# --- whose turn it is -----------------------------------------------------------------------------


class Cut:
    """A connection whose end ends what reads from it."""

    def __init__(self, reader: asyncio.Event | None = None) -> None:
        self.reader, self.cut = reader, False

    def abort(self) -> None:
        self.cut = True
        if self.reader:
            self.reader.set()


def test_the_newest_connection_has_the_turn_once_the_older_one_has_stored_what_it_had() -> None:
    async def work(doors: Intake) -> None:
        said, end = [], asyncio.Event()

        async def send(name: str, upload: str, connection: Any) -> None:
            async with doors.turn("device", upload, connection, 2):
                said.append(f"{name} begins")
                await (connection.reader or asyncio.Event()).wait()
                await asyncio.sleep(0.02)
                said.append(f"{name} has stored")

        older, other = Cut(end), Cut(asyncio.Event())
        tasks = [asyncio.create_task(send("older", "a", older))]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(send("other", "b", other)))
        await asyncio.sleep(0)
        newer = Cut(asyncio.Event())
        tasks.append(asyncio.create_task(send("newer", "a", newer)))
        await asyncio.sleep(0.1)
        assert said == ["older begins", "other begins", "older has stored", "newer begins"]
        assert (older.cut, other.cut, newer.cut) == (True, False, False)
        tasks.append(asyncio.create_task(send("third", "c", Cut(asyncio.Event()))))
        await asyncio.sleep(0.1)
        assert said[4:] == ["other has stored", "third begins"]  # the oldest of two goes
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with doors.turn("device", "d", None, 2):
            pass

    crowd(work, places=1, queue=3)


def test_who_cannot_have_the_turn_soon_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "TURN_S", 0.05)

    async def work(doors: Intake) -> None:
        deaf: Any = Cut()
        async with doors.turn("device", "a", deaf, 2):
            with pytest.raises(Busy):
                async with doors.turn("device", "a", deaf, 2):
                    raise AssertionError("both have it")
            async with doors.turn("another", "b", deaf, 2):
                pass

    crowd(work, places=1, queue=3)
