"""Natural Instructions as clients: read the file, filter, choose who takes part and who does not.

The file is xz-compressed JSON, one client a line: `client` (id), `category`, `task` (its number in Natural
Instructions), `instruction`, and `train`, `eval` and `test`, each a list of `[input, output]`. Every client
is one task, so that clients differ as much as people's text does.
"""

from __future__ import annotations

import json
import lzma
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sdk.core.errors import InputError

Pair = tuple[str, str]
"""Input and output of one row."""

COUNTED_ROWS = 20  # rows of a client that its median length is taken over


@dataclass(frozen=True)
class Client:
    """One task of the file. `held_out`: the rows of `eval` and `test` whose input is in no `train` row."""

    id: int
    category: str
    task: int
    instruction: str
    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]

    def records(self, pairs: Sequence[Pair]) -> list[dict[str, str]]:
        """Rows in the form of a device's JSONL file."""
        return [{"instruction": self.instruction, "input": i, "output": o} for i, o in pairs]

    @property
    def ascii_share(self) -> float:
        """Share of the characters of its instruction and training rows that are ASCII."""
        text = self.instruction + "".join(i + o for i, o in self.train)
        return sum(character < "\x80" for character in text) / max(1, len(text))


@dataclass(frozen=True)
class Filter:
    """What a small English base model can serve at all. Rows without an output do not count."""

    excluded: tuple[str, ...] = ("Translation",)
    ascii_share: float = 0.98
    train_rows: int = 100
    held_out_rows: int = 24
    median_tokens: int = 192

    def __str__(self) -> str:
        return (
            f"not {' or '.join(self.excluded)}; at least {self.ascii_share:.0%} ASCII; at least "
            f"{self.train_rows} train rows and {self.held_out_rows} held-out rows with an output; a median "
            f"of at most {self.median_tokens} tokens with the base model's tokenizer"
        )


@dataclass(frozen=True)
class Choice:
    """Clients that train, and clients that take no part: of the participants' categories, and of others."""

    participants: tuple[Client, ...]
    same_category: tuple[Client, ...]
    other_category: tuple[Client, ...]

    @property
    def unseen(self) -> dict[str, tuple[Client, ...]]:
        """The clients that take no part, by group."""
        return {"same category": self.same_category, "other category": self.other_category}


# --- reading -------------------------------------------------------------------------------------


def read_clients(path: Path) -> list[Client]:
    """All clients of the file, in its order.

    Raises:
        InputError: no such file, damaged compression, or a line that is no client; names the line.
    """
    clients = []
    number = 0
    try:
        with lzma.open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                clients.append(_client(line, f"{path}:{number}"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file; name Natural Instructions as xz-compressed JSON lines, one client a line"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (lzma.LZMAError, EOFError) as error:
        raise InputError(
            f"{path}: not a whole xz file (damaged after line {number}: {error}); fetch it again"
        ) from error
    if not clients:
        raise InputError(f"{path}: holds no clients; each line is one JSON object")
    return clients


def _client(line: bytes, where: str) -> Client:
    """One line as a client."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); each line is one JSON object") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON {type(record).__name__}, not an object")
    train = list(_pairs(record, "train", where))
    seen = {text for text, _ in train}
    held_out = [*_pairs(record, "eval", where), *_pairs(record, "test", where)]
    return Client(
        id=_field(record, "client", int, where),
        category=_field(record, "category", str, where),
        task=_field(record, "task", int, where),
        instruction=_field(record, "instruction", str, where),
        train=tuple(train),
        held_out=tuple(pair for pair in held_out if pair[0] not in seen),
    )


def _field(record: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """A field that must be there and of its type."""
    if key not in record:
        raise InputError(f"{where}: the field {key!r} is missing")
    if not isinstance(record[key], kind) or isinstance(record[key], bool):
        raise InputError(f"{where}: {key!r} is a JSON {type(record[key]).__name__}, not {kind.__name__}")
    return record[key]


def _pairs(record: Mapping[str, Any], key: str, where: str) -> Iterator[Pair]:
    """The rows of a part that have an output."""
    for index, pair in enumerate(_field(record, key, list, where)):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise InputError(f"{where}: {key}[{index}] is not a pair of texts [input, output]")
        if pair[1].strip():
            yield pair[0], pair[1]


# --- choosing ------------------------------------------------------------------------------------


def eligible(clients: Sequence[Client], wanted: Filter, tokens: Callable[[str], int]) -> list[Client]:
    """The clients that pass the filter, in their order. `tokens` counts those of a text.

    Tokens are counted last, on the first rows of what is left, because that takes longest.
    """
    return [
        client
        for client in clients
        if client.category not in wanted.excluded
        and len(client.train) >= wanted.train_rows
        and len(client.held_out) >= wanted.held_out_rows
        and client.ascii_share >= wanted.ascii_share
        and _median_tokens(client, tokens) <= wanted.median_tokens
    ]


def _median_tokens(client: Client, tokens: Callable[[str], int]) -> float:
    """Median length of a row: instruction, input and output."""
    instruction = tokens(client.instruction)
    return statistics.median(instruction + tokens(i) + tokens(o) for i, o in client.train[:COUNTED_ROWS])


def choose(clients: Sequence[Client], devices: int, unseen: int, seed: int) -> Choice:
    """Draw `devices` participants of different categories, and up to `unseen` others for each group.

    Only a category with two clients or more gives a participant, so that it also has one that takes no part.
    Those are drawn evenly: one of each category, then a second of each, and so on.

    Raises:
        InputError: fewer such categories than devices.
    """
    rng = random.Random(seed)
    by_category = _shuffled(clients, rng)
    able = sorted(category for category, members in by_category.items() if len(members) > 1)
    if not 1 <= devices <= len(able):
        raise InputError(
            f"--devices {devices}: each device is a client of another category, and {len(able)} categories "
            f"have two clients or more that pass the filter; choose 1 to {len(able)}"
        )
    chosen = rng.sample(able, devices)
    others = sorted(category for category in by_category if category not in chosen)
    rng.shuffle(others)
    return Choice(
        participants=tuple(by_category[category][0] for category in chosen),
        same_category=_evenly([by_category[category][1:] for category in chosen], unseen),
        other_category=_evenly([by_category[category] for category in others], unseen),
    )


def spread(clients: Sequence[Client], count: int, seed: int) -> tuple[Client, ...]:
    """Draw `count` clients evenly over all categories: one of each, then a second of each, and so on.

    Raises:
        InputError: there are fewer clients.
    """
    if not 1 <= count <= len(clients):
        raise InputError(f"{count} devices: {len(clients)} clients pass the filter; choose so many at most")
    rng = random.Random(seed)
    groups = _shuffled(clients, rng)
    categories = sorted(groups)
    rng.shuffle(categories)
    return _evenly([groups[category] for category in categories], count)


def _shuffled(clients: Sequence[Client], rng: random.Random) -> dict[str, list[Client]]:
    """The clients of each category in an order drawn by `rng`."""
    by_category: dict[str, list[Client]] = {}
    for client in sorted(clients, key=lambda client: client.id):
        by_category.setdefault(client.category, []).append(client)
    for members in by_category.values():
        rng.shuffle(members)
    return by_category


def _evenly(groups: Sequence[Sequence[Client]], count: int) -> tuple[Client, ...]:
    """Up to `count` members: the first of every group, then the second of every group, …"""
    longest = max(map(len, groups), default=0)
    in_turn = [group[place] for place in range(longest) for group in groups if place < len(group)]
    return tuple(in_turn[:count])
