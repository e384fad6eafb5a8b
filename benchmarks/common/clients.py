"""Whose text the federations of `rules_training` train on: Natural Instructions, or smart-home commands.

Natural Instructions: one client is one task. Clients that rates were tuned on are taken out before those of
the comparison are drawn, so that no rule is measured on text that its rate was chosen by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.core.errors import InputError
from examples import smart_home
from examples.instruction_clients import Client, Filter, choose, eligible, read_clients, spread

Record = Mapping[str, str]

TUNING_SEED = 1000
MEDIAN_TOKENS = 128  # of a client's rows: longer ones would be cut, and cost time
DEVICES, UNSEEN, TEST_ROWS = 20, 10, 8
HOUSEHOLDS = 5  # of 3 or 4 intents: two intents are in no household


@dataclass(frozen=True)
class Task:
    """One client's rows for training, and rows that are held out."""

    name: str
    train: tuple[Record, ...]
    test: tuple[Record, ...]


@dataclass(frozen=True)
class Clients:
    """Who trains, and tasks that nobody trains, by group (empty for a data set that has none such)."""

    participants: tuple[Task, ...]
    unseen: Mapping[str, tuple[Task, ...]]


def check_there(path: Path) -> None:
    """Say what is needed before anything is loaded.

    Raises:
        InputError: no such file.
    """
    if not path.exists():
        raise InputError(
            f"{path}: no such file; the comparison on real text needs Natural Instructions as "
            "xz-compressed JSON lines, one client a line; or choose --data smart-home"
        )


class NaturalInstructions:
    """The clients of the file that pass the filter, read once.

    Args:
        path: `clients.jsonl.xz`.
        tokens: counts the tokens of a text.
    """

    def __init__(self, path: Path, tokens: Callable[[str], int]) -> None:
        self.filter = Filter(median_tokens=MEDIAN_TOKENS)
        self._usable = eligible(read_clients(path), self.filter, tokens)

    def clients(self, seed: int) -> Clients:
        """Participants of different categories and clients that take no part, drawn by `seed`."""
        usable = self._usable
        if seed != TUNING_SEED:
            tuned_on = choose(usable, DEVICES, UNSEEN, TUNING_SEED)
            taken = {c.id for c in (*tuned_on.participants, *tuned_on.same_category)}
            taken |= {c.id for c in tuned_on.other_category}
            usable = [client for client in usable if client.id not in taken]
        choice = choose(usable, DEVICES, UNSEEN, seed)
        unseen = {group: _tasks(clients) for group, clients in choice.unseen.items()}
        return Clients(_tasks(choice.participants), unseen)

    def many(self, devices: int, test_rows: int, seed: int, tuned_on: Sequence[int] = ()) -> tuple[Task, ...]:
        """Clients of all categories, drawn evenly by `seed`, but for those that seeds of `tuned_on` draw."""
        usable = self._usable
        if seed not in tuned_on:
            taken = {client.id for other in tuned_on for client in spread(usable, devices, other)}
            usable = [client for client in usable if client.id not in taken]
        return _tasks(spread(usable, devices, seed), test_rows)


def _tasks(clients: Sequence[Client], test_rows: int = TEST_ROWS) -> tuple[Task, ...]:
    """The clients' training rows, and `test_rows` held-out rows taken evenly."""
    tasks = []
    for client in clients:
        count = len(client.held_out)
        held_out = [client.held_out[place * count // test_rows] for place in range(min(test_rows, count))]
        rows = tuple(client.records(client.train)), tuple(client.records(held_out))
        tasks.append(Task(f"{client.category} {client.task}", *rows))
    return tuple(tasks)


class SmartHome:
    """The households of the demonstration, which are always there; unseen: intents that none of them has."""

    def __init__(self, households: int = HOUSEHOLDS) -> None:
        self._households = households

    def clients(self, seed: int) -> Clients:
        """Households drawn by `seed`."""
        homes = smart_home.households(self._households, seed)
        known = {intent for home in homes for intent in home.intents}
        others = tuple(intent for intent in smart_home.INTENTS if intent not in known)
        tasks = tuple(Task(intent, (), smart_home.test_set((intent,), TEST_ROWS, seed)) for intent in others)
        return Clients(
            tuple(Task(home.name, home.train, home.test) for home in homes), {"other intent": tasks}
        )
