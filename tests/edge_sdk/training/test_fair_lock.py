"""Whoever asks for the model in the middle of a step comes next."""

from __future__ import annotations

import threading
import time

from edge_sdk.training.fair_lock import FairLock
from tests.processes import PATIENCE_S


def wait_for_queue(turns: FairLock, length: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while turns.waiting < length:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_turns_are_granted_in_the_order_of_asking() -> None:
    turns, order = FairLock(), []

    def take(number: int) -> None:
        with turns:
            order.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(5)]
    with turns:
        for place, thread in enumerate(threads, 1):
            thread.start()
            wait_for_queue(turns, place)
        assert order == []
    for thread in threads:
        thread.join(PATIENCE_S)
    assert order == [0, 1, 2, 3, 4]


def test_one_that_asks_again_at_once_waits_for_the_others() -> None:
    turns, order = FairLock(), []

    def answer() -> None:
        with turns:
            order.append("answer")

    thread = threading.Thread(target=answer)
    for step in range(3):
        with turns:
            order.append(f"step {step}")
            if step == 0:
                thread.start()
                wait_for_queue(turns, 1)
    thread.join(PATIENCE_S)
    assert order == ["step 0", "answer", "step 1", "step 2"]


def test_a_turn_within_a_turn_is_the_same_one() -> None:
    turns, taken = FairLock(), threading.Event()

    def take() -> None:
        with turns:
            taken.set()

    thread = threading.Thread(target=take)
    with turns:
        with turns:
            thread.start()
            wait_for_queue(turns, 1)
        assert not taken.is_set()
    assert taken.wait(PATIENCE_S)
    thread.join()


def test_an_error_gives_the_turn_back() -> None:
    turns = FairLock()
    try:
        with turns:
            raise ValueError
    except ValueError:
        pass
    thread = threading.Thread(target=turns.__enter__)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
