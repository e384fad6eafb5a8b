"""Seats for connections: how many an address may have."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from coordinator.listening import Serving
from coordinator.web.connections import Connections


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
