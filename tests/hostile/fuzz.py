"""Arbitrary bytes to the targets of fuzz_targets.py: `python -m tests.hostile.fuzz TARGET --seed N --runs N`.

The inputs are honest samples, spoilt by a seed; with `--coverage` atheris chooses them (`pip install
"flexlora-edge[fuzz]"`, Python 3.11 to 3.13). What takes too long or too much memory is a finding too.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType

from tests.hostile.fuzz_targets import TARGETS

MOST_S = 5.0  # for one input; a thousandth of it is usual
MOST_BYTES = 512 << 20  # for one input, above what was held before

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


class TooLong(Exception):
    """An input took more than MOST_S."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Stop what takes too long: by an alarm, where there are alarms and this is the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MOST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def run(target: str, seed: int, runs: int, seconds: float = float("inf")) -> int:
    """Bounded, and the same inputs for the same seed; how many there were.

    Raises:
        AssertionError: the contract is broken; names the input's number and shows it.
    """
    fuzzed, chance = TARGETS[target], random.Random(seed)
    ending, peak = time.monotonic() + seconds, peak_bytes()
    for number in range(runs):
        content = spoilt(chance, fuzzed.samples)
        if time.monotonic() > ending:
            return number
        try:
            with bounded():
                fuzzed.read(content)
        except Exception as error:  # whatever it is, it is not of the contract
            raise AssertionError(f"{target}, seed {seed}, input {number}: {content!r}") from error
        assert peak_bytes() < peak + MOST_BYTES, f"{target}, seed {seed}, input {number}: {content[:200]!r}"
    return runs


def peak_bytes() -> int:
    """The most memory that this process has held so far, as Linux counts it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def guided(target: str, seed: int, seconds: int, corpus: Path) -> None:
    """By coverage, with atheris (https://github.com/google/atheris), until time is over; never returns.

    Functions are instrumented where they are: as much as an input can reach, and no library but tomllib.
    libFuzzer ends an input that takes too long or too much memory, and what it reports is the input.
    """
    import atheris  # type: ignore[import-not-found,unused-ignore]

    for number, sample in enumerate(TARGETS[target].samples):
        (corpus / str(number)).write_bytes(sample)
    for function in own_functions():
        atheris.instrument_func(function)
    faulthandler.enable()  # what ran when libFuzzer ended it
    limits = [f"-timeout={MOST_S:.0f}", f"-rss_limit_mb={(peak_bytes() + MOST_BYTES) >> 20}"]
    flags = [f"-seed={seed}", f"-max_total_time={seconds}", "-max_len=65536", *limits, str(corpus)]
    atheris.Setup([sys.argv[0], *flags], TARGETS[target].read)
    atheris.Fuzz()


def own_functions() -> Iterator[FunctionType]:
    """All functions and methods of modules that are loaded, of this project and of tomllib."""
    seen: set[CodeType] = set()
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] in ("edge_sdk", "coordinator", "tomllib"):
            values = list(vars(module).values())
            values += [value for kind in values if isinstance(kind, type) for value in vars(kind).values()]
            for value in values:
                function = getattr(value, "__func__", getattr(value, "fget", value))
                own = isinstance(function, FunctionType) and function.__module__ == name
                if own and function.__code__ not in seen:
                    seen.add(function.__code__)
                    yield function


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--coverage", action="store_true", help="let atheris guide it")
    arguments = parser.parse_args()
    logging.disable()
    if arguments.coverage:
        with tempfile.TemporaryDirectory() as folder:
            guided(arguments.target, arguments.seed, arguments.seconds, Path(folder))
    # What hangs where no alarm is heard is ended too.
    faulthandler.dump_traceback_later(arguments.seconds + 10 * MOST_S, exit=True)
    count = run(arguments.target, arguments.seed, arguments.runs, arguments.seconds)
    print(f"{arguments.target}: {count} inputs, nothing found")


if __name__ == "__main__":
    main()
