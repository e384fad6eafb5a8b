"""What an application's process and the process that trains say to each other. Neither imports torch for it.

One JSON object a line, `{"kind", "id", "body"}`. To the worker: `prepare`, `train` and `generate`, each
answered once under its id, and `tell` with a word for the training of that id, which has no answer. From the
worker: `reply` or `error`; before it, without waiting for anybody, `step` after every step of a training and
`text` for the pieces of an answer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from edge_sdk.core.adapter_file.dtypes import WireDtype
from edge_sdk.core.choice.carried import CarriedDtype
from edge_sdk.core.choice.setting import Ranks
from edge_sdk.core.errors import EdgeError, ProtocolError, from_problem
from edge_sdk.core.ranges import (
    ByteCount,
    Count,
    Digest,
    Factor,
    Key,
    Loss,
    Rank,
    RankOrNone,
    Seconds,
    Seed,
    Several,
    Width,
)
from edge_sdk.training.plan import Abandoned, Interrupted, Plan

Word = Literal["finish", "abandon", "interrupt"]
WORDS = get_args(Word)

# Outcomes of a training call that are no errors, by the title of their problem document.
OUTCOMES: dict[str, type[Exception]] = {"abandoned": Abandoned, "interrupted": Interrupted}


@dataclass(frozen=True)
class Setup:
    """What a worker is made of. `model` as `base_model.load` takes it; `modules`: target -> (out, in)."""

    model: str
    modules: dict[Key, tuple[Width, Width]]
    scaling: Factor
    upload_dtype: WireDtype = "float32"  # of the finished adapter
    data: str | None = None  # JSONL; None for a worker that only answers
    device: str = "auto"
    quantise: bool = True
    threads: Several = 1
    niceness: int = 0
    progress: bool = False  # bars on stderr
    bitsandbytes: bool = True  # False: it must not be imported, because that ends the process
    alone: bool = True  # in its process: then it may lower its priority
    trust_remote_code: bool = False  # whether code that comes with the model may run


@dataclass(frozen=True)
class Job:
    """One assignment, in files.

    `adapter` and `carried` are those of `plan.Start`, cut to `ranks` and to `carry_rank` where they hold
    more. `checkpoint` is continued from if it is of this assignment, at this setting or a larger one, and
    `outbox` is where the finished adapter goes.
    """

    ranks: Ranks
    seed: Seed
    plan: Plan
    checkpoint: str
    outbox: str
    adapter: str | None = None
    carried: str | None = None
    carry_rank: RankOrNone = 0  # components of `carried` to hold; 0: all
    carried_dtype: CarriedDtype = "float32"


@dataclass(frozen=True)
class Memory:
    """Bytes in the worker's process. `peak` is since the last training call began; 0 where unknown.

    `framework`: resident once the libraries were imported and before a weight was loaded; 0 if the worker
    shares its process with the application.
    `accelerator_*`: torch's own figures on CUDA, what tensors took and what torch held for them.
    """

    framework_bytes: ByteCount
    resident_bytes: ByteCount
    peak_bytes: ByteCount
    accelerator_peak_bytes: ByteCount = 0
    accelerator_reserved_bytes: ByteCount = 0


@dataclass(frozen=True)
class Finished:
    """An assignment that was trained. The file at `Job.outbox` has this digest, size and largest rank."""

    rank: Rank
    digest: Digest
    size_bytes: ByteCount
    examples: Count
    steps: Count
    loss_before: Loss
    loss_after: Loss
    seconds: Seconds
    memory: Memory


@dataclass(frozen=True)
class Prepared:
    """A worker that is ready: how many examples it holds, and its memory."""

    examples: Count
    seconds: Seconds
    memory: Memory


@dataclass(frozen=True)
class Question:
    """Prompts for the base with the adapter in a file (None: the base alone)."""

    prompts: tuple[str, ...]
    max_new_tokens: Several
    adapter: str | None = None


def line(kind: str, id: int, body: Any) -> bytes:
    """One message as it goes through the pipe."""
    return json.dumps({"kind": kind, "id": id, "body": body}, separators=(",", ":")).encode() + b"\n"


def parsed(raw: bytes) -> tuple[str, int, Any]:
    """Kind, id and body of a line.

    Raises:
        ProtocolError: it is no such message.
    """
    try:
        message = json.loads(raw)
        return str(message["kind"]), int(message["id"]), message["body"]
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ProtocolError(f"the worker's pipe holds no message: {raw[:80]!r}") from error


def problem(error: Exception) -> dict[str, Any]:
    """An error as it crosses the pipe: the problem document that would report it over HTTP."""
    for title, kind in OUTCOMES.items():
        if isinstance(error, kind):
            return {"title": title, "status": 0, "detail": ""}
    if isinstance(error, EdgeError):
        return {"title": error.title, "status": error.status, "detail": str(error), **error.details}
    return {"title": "internal error", "status": 500, "detail": f"{type(error).__name__}: {error}"}


def raised(document: dict[str, Any]) -> Exception:
    """The error on the other side of the pipe, of the same class."""
    if (outcome := OUTCOMES.get(str(document.get("title")))) is not None:
        return outcome()
    return from_problem(document)
