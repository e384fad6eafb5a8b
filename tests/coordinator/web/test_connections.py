"""Seats for connections: who may have how many, which one goes for another, and what an unread answer is."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.listening import Serving
from coordinator.web.connections import Connections, Seat
from coordinator.web.unread import Patience, taken_bytes


class Transport:
    """One that notes its end."""

    aborted = False

    def abort(self) -> None:
        self.aborted = True


def admitted(connections: Connections, address: str) -> Seat:
    made: Any = None
    seat = connections.admit(made, address)
    assert seat is not None
    transport: Any = Transport()
    seat.transport = transport
    return seat


def is_cut(seat: Seat) -> bool:
    transport: Any = seat.transport
    return bool(transport.aborted)


def test_the_quietest_goes_for_the_newest() -> None:
    connections = Connections(3, 3)
    seats = [admitted(connections, f"10.0.0.{n}") for n in range(3)]
    with connections.at_work(seats[0]):
        pass  # now the second is the quietest
    admitted(connections, "10.0.0.9")
    assert [is_cut(seat) for seat in seats] == [False, True, False]
    assert len(connections) == 3


def test_one_at_work_stays() -> None:
    connections = Connections(2, 2)
    first, second = admitted(connections, "10.0.0.1"), admitted(connections, "10.0.0.2")
    with connections.at_work(first), connections.at_work(first), connections.at_work(second):
        assert connections.admit(second.socket, "10.0.0.3") is None
    assert connections.admit(second.socket, "10.0.0.3") is not None
    assert (is_cut(first), is_cut(second)) == (False, True)  # its work was over first


def test_an_address_takes_of_its_own() -> None:
    connections = Connections(10, 2, is_proxy=lambda address: address == "10.0.0.7")
    other = admitted(connections, "10.0.0.1")
    mine = [admitted(connections, "2001:db8::1"), admitted(connections, "2001:db8::2")]
    admitted(connections, "2001:db8::3")  # the same /64
    assert [is_cut(seat) for seat in (other, *mine)] == [False, True, False]
    proxied = [admitted(connections, "10.0.0.7") for _ in range(6)]
    assert not any(map(is_cut, proxied))


@given(
    st.lists(st.tuples(st.sampled_from(["open", "close", "work", "rest"]), st.integers(0, 5)), max_size=80)
)
def test_counts_are_right_whatever_happens(steps: list[tuple[str, int]]) -> None:
    connections, seats, working = Connections(4, 2), [], {}
    for what, number in steps:
        if what == "open":
            made: Any = None
            seat = connections.admit(made, f"10.0.0.{number}")
            if seat:
                seat.transport = Transport()  # type: ignore[assignment]
                seats.append(seat)
        elif seats:
            seat = seats[number % len(seats)]
            if what == "close":
                connections.release(seat)
            elif what == "work" and seat not in working:
                working[seat] = connections.at_work(seat)
                working[seat].__enter__()
            elif what == "rest" and seat in working:
                working.pop(seat).__exit__(None, None, None)
        assert len(connections) <= 4
    for seat, work in working.items():
        work.__exit__(None, None, None)
        connections.release(seat)
    for seat in seats:
        connections.release(seat)
    assert len(connections) == 0
    assert not connections.make_room()


@pytest.fixture
def accepted() -> Iterator[socket.socket]:
    one, other = socket.socketpair()
    with one, other:
        yield one


def test_an_address_has_its_number_and_the_hosts_proxies_have_no_number(accepted: socket.socket) -> None:
    proxies = Serving(trusted_proxies=("10.0.0.0/8", "127.0.0.2"))
    for strict in (False, True):
        connections = Connections(100, 2, strict, is_proxy=proxies.trusts)
        with contextlib.ExitStack() as under_way:
            for address in ("203.0.113.1", "10.1.1.1", "127.0.0.1", "127.0.0.2"):
                given = []
                for _ in range(4):
                    seat = connections.admit(accepted, address)
                    given.append(seat is not None)
                    if seat is not None:
                        under_way.enter_context(connections.at_work(seat))
                limited = address == "203.0.113.1" or (strict and address == "127.0.0.1")
                assert given == [True, True, not limited, not limited], (strict, address)


# --- what is taken of an answer -------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sending = socket.create_connection(server.getsockname())
        reading, _ = server.accept()
        with sending, reading:
            yield sending, reading


def test_what_the_other_end_has_taken(pair: tuple[socket.socket, socket.socket]) -> None:
    sending, reading = pair
    before = taken_bytes(sending)
    if before is None:
        pytest.skip("the system does not say")
    sending.sendall(b"x" * 10_000)
    deadline = time.monotonic() + 10.0
    while (taken := taken_bytes(sending) or 0) < before + 10_000:
        assert time.monotonic() < deadline, taken
    assert reading.recv(1) == b"x"
    assert taken_bytes(object()) is None


@pytest.mark.parametrize(
    ("taken", "buffered", "over"),
    [
        ((0, 0), (9, 9), True),
        ((0, 2559), (9, 9), True),  # 256 bytes a second
        ((0, 2560), (9, 9), False),
        ((None, None), (9, 9), True),
        ((None, None), (9, 8), False),
        ((None, None), (0, 0), False),  # of a file that the system sends nobody knows
    ],
)
def test_when_an_answer_is_unread(
    taken: tuple[int | None, int | None], buffered: tuple[int, int], over: bool
) -> None:
    patience = Patience(10.0)
    assert not patience.is_over(0.0, buffered[0], taken[0])
    assert not patience.is_over(9.0, buffered[1], taken[1])
    assert patience.is_over(10.0, buffered[1], taken[1]) == over


def test_time_counts_from_when_something_is_owed() -> None:
    patience = Patience(10.0)
    assert not patience.is_over(0.0, 9, 0)
    patience.end()
    assert not patience.is_over(10.0, 9, 0)
    assert patience.is_over(20.0, 9, 0)


def test_an_unread_connection_is_cut() -> None:
    async def run() -> bool:
        connections = Connections(2, 2, answer_s=0.2)
        seat = admitted(connections, "10.0.0.1")
        transport: Any = seat.transport
        transport.get_write_buffer_size = lambda: 5
        watching = asyncio.create_task(connections.watch())
        await asyncio.sleep(1.0)
        watching.cancel()
        return is_cut(seat)

    assert asyncio.run(run())
