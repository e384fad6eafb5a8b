"""Arbitrary bytes to whatever reads a stranger's: `python -m tests.hostile.fuzz TARGET --seed N --runs N`.

The contract of each target: only errors of the documented kinds, and what decodes encodes back to the same.
The inputs are honest samples, spoilt by a seed; with `--coverage` atheris chooses them, where installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.engine.policy import Policy
from coordinator.settings import FederationSettings
from edge_sdk.connection.refusals import error_of
from edge_sdk.core import records, toml_file
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import AdapterError, EdgeError, InputError, ProtocolError, TooLarge
from edge_sdk.core.messages import PROBLEM_CONTENT_TYPE
from edge_sdk.core.routes import ROUTES
from tests.coordinator.devices import SCALING, SHAPES, random_adapter

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
KINDS: tuple[type[Any], ...] = tuple(
    dict.fromkeys(
        kind
        for route in ROUTES
        for kind in (route.body, *(answer.content for answer in route.answers))
        if isinstance(kind, type)
    )
)


@dataclass(frozen=True)
class HostFile:
    """Tables of a host's configuration."""

    base: str = "tiny"
    federation: FederationSettings = field(default_factory=FederationSettings)
    policy: Policy = field(default_factory=Policy)


MOST_S = 5.0  # for one input; a thousandth of it is usual


@dataclass(frozen=True)
class Fuzzed:
    """What is fuzzed: `read` raises AssertionError where the contract is broken; `samples` are honest."""

    read: Callable[[bytes], None]
    samples: tuple[bytes, ...]


def adapter(content: bytes) -> None:
    """A file is refused by name, or its values encode to a file with the same values."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            opened = codec.open_adapter(Path(file.name), SHAPES, 4, SCALING, 1 << 20)
            found = dict(opened.modules())
        except (AdapterError, TooLarge) as error:
            assert "\n" not in str(error)
            return
        again = codec.encode(found, SCALING)
        with tempfile.NamedTemporaryFile() as second:
            second.write(again)
            second.flush()
            reread = codec.open_adapter(Path(second.name), SHAPES, 4, SCALING, 1 << 20)
            assert codec.encode(dict(reread.modules()), SCALING) == again


def header(content: bytes) -> None:
    """The check for a file that a coordinator sent: whole, or refused by name."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            codec.require_whole(Path(file.name))
        except (AdapterError, TooLarge) as error:
            assert "\n" not in str(error)


def record(content: bytes) -> None:
    """The first byte chooses the kind; what decodes is the same after a round."""
    kind = KINDS[content[0] % len(KINDS)] if content else KINDS[0]
    try:
        decoded = records.decode(kind, content[1:])
    except (ProtocolError, InputError, ValueError) as error:
        assert isinstance(error, EdgeError | UnicodeDecodeError | json.JSONDecodeError) or str(error)
        return
    assert records.decode(kind, records.encode(decoded)) == decoded


def problem(content: bytes) -> None:
    """Any answer becomes an error of the tree; the first byte chooses the status."""
    import httpx

    status = 400 + (content[0] if content else 0) % 200
    answer = httpx.Response(
        status,
        headers={"Content-Type": PROBLEM_CONTENT_TYPE},
        content=content[1:],
        request=httpx.Request("GET", "http://x/"),
    )
    assert isinstance(error_of(answer), EdgeError)


def toml(content: bytes) -> None:
    """A host's file is its tables or one error of input."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with contextlib.suppress(InputError):
            toml_file.load(HostFile, Path(file.name))


def _adapters() -> tuple[bytes, ...]:
    dtypes: tuple[Any, ...] = ("float32", "float16", "int8")
    return tuple(codec.encode(random_adapter(2, seed, 0.1), SCALING, d) for seed, d in enumerate(dtypes))


def _records() -> tuple[bytes, ...]:
    return tuple(
        bytes([number]) + (GOLDEN / f"{kind.__name__}.json").read_bytes()
        for number, kind in enumerate(KINDS)
        if (GOLDEN / f"{kind.__name__}.json").exists()
    )


PROBLEMS = (
    b'\x16{"title": "adapter refused", "status": 422, "detail": "x", "retry_after_s": 3}',
    b'\x09{"title": "wrong upload offset", "status": 409, "detail": "x", "offset": 7}',
    b'\x09{"title": "stale update", "status": 409, "detail": "x", "current": 3}',
)
TOML = (b"base = 'base.json'\n[federation]\nladder = [2, 4]\nrank_cap = 8\n[policy]\nbuffer_size = 2\n",)
TARGETS = {
    "adapter": Fuzzed(adapter, _adapters()),
    "header": Fuzzed(header, _adapters()),
    "record": Fuzzed(record, _records()),
    "problem": Fuzzed(problem, PROBLEMS),
    "toml": Fuzzed(toml, TOML),
}

PIECES = (
    b"[" * 3000,
    b"9" * 500,
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"\xff",
    b"\n",
    b'"',
    b"}",
    b"\\ud800",
    b"\0" * 8,
)
"""What is put into samples beside random bytes."""


def spoilt(chance: random.Random, samples: Sequence[bytes]) -> bytes:
    """A sample with a few of its bytes changed, removed, doubled or replaced by awkward pieces."""
    content = bytearray(chance.choice(samples))
    for _ in range(chance.randrange(1, 5)):
        at = (
            chance.randrange(len(content) + 1)
            if chance.random() < 0.5
            else chance.randrange(min(len(content), 700) + 1)
        )
        end = min(len(content), at + chance.choice((0, 1, 1, 4, 40)))
        piece = chance.choice((chance.randbytes(1), chance.choice(PIECES), bytes(content[at:end]) * 2, b""))
        content[at:end] = piece
    return bytes(content)


def run(target: str, seed: int, runs: int, seconds: float = float("inf")) -> int:
    """Bounded, and the same inputs for the same seed; how many there were.

    Raises:
        AssertionError: the contract is broken; names the input's number and shows it.
    """
    fuzzed, chance = TARGETS[target], random.Random(seed)
    ending = time.monotonic() + seconds
    for number in range(runs):
        content = spoilt(chance, fuzzed.samples)
        begun = time.monotonic()
        if begun > ending:
            return number
        try:
            fuzzed.read(content)
        except Exception as error:  # whatever it is, it is not of the contract
            raise AssertionError(f"{target}, seed {seed}, input {number}: {content!r}") from error
        assert time.monotonic() - begun < MOST_S, (target, seed, number)
    return runs


def guided(target: str, seed: int, seconds: int, corpus: Path) -> None:
    """By coverage, with atheris (https://github.com/google/atheris), until time is over; never returns."""
    import atheris  # type: ignore[import-not-found,unused-ignore]

    for number, sample in enumerate(TARGETS[target].samples):
        (corpus / str(number)).write_bytes(sample)
    atheris.instrument_all()
    flags = [f"-seed={seed}", f"-max_total_time={seconds}", "-max_len=65536", str(corpus)]
    atheris.Setup([sys.argv[0], *flags], TARGETS[target].read)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--coverage", action="store_true", help="let atheris guide it")
    arguments = parser.parse_args()
    if arguments.coverage:
        with tempfile.TemporaryDirectory() as folder:
            guided(arguments.target, arguments.seed, arguments.seconds, Path(folder))
    count = run(arguments.target, arguments.seed, arguments.runs, arguments.seconds)
    print(f"{arguments.target}: {count} inputs, nothing found")


if __name__ == "__main__":
    main()
