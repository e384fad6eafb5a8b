"""What the doctor looks at beyond the machine: the coordinator, its clock, the data file, the base model."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk.core.choice.memory import human_bytes
from edge_sdk.core.errors import EdgeError, InputError, TheirFault, Unauthorised, WrongKey
from edge_sdk.core.messages import Federation
from edge_sdk.diagnosis.check import Check, fine, not_fine, warning
from edge_sdk.model import files
from edge_sdk.options import Options
from edge_sdk.text.examples import load_examples

if TYPE_CHECKING:
    from edge_sdk.connection.transport import Transport  # and with it httpx, which may be what is missing

# Nothing in the protocol depends on the clock; certificates (valid from … to) and logs do.
CLOCK_S = 300.0

ADAPTER_BYTES = 4  # a value of a downloaded or finished adapter
CHECKPOINT_BYTES = 12  # of a trained value: itself and two moments
RESERVE_BYTES = 50_000_000  # logs, digests, the file system's own


def coordinator_check(transport: Transport, has_token: bool) -> tuple[Check, Federation | None]:
    """Whether the coordinator answers, speaks this protocol and knows the token; and what it serves."""
    try:
        federation = transport.federation()
    except Unauthorised as error:
        if not has_token:
            found = f"{transport.url} answers; without a token it tells no more"
            return warning("coordinator", found, "add --token TOKEN, the federation's join token"), None
        mend = "ask the host for the join token; it lies in the file `join-token` of its data folder"
        return not_fine("coordinator", f"{transport.url} answers: {error}", mend), None
    except WrongKey as error:
        return not_fine(
            "coordinator", str(error), "on the host, `edge-coordinator invite`; here, the invitation"
        ), None
    except EdgeError as error:
        mend = "on the host, `edge-coordinator serve --host 0.0.0.0` and an open port; here, the network"
        if isinstance(error, TheirFault):
            mend = "check the address; or update the older of the two: python -m pip install -U flexlora-edge"
        return not_fine("coordinator", str(error), mend), None
    text = f"{transport.url} serves federation {federation.id}: {federation.base.model}, ranks "
    return fine("coordinator", text + ", ".join(map(str, federation.ladder))), federation


def clock_check(server_date: str, now_s: float | None = None) -> Check:
    """This machine's clock against the Date header of an answer."""
    try:
        theirs = parsedate_to_datetime(server_date)
    except ValueError:
        return warning("clock", f"the coordinator's date {server_date[:40]!r} is none", "tell its host")
    if theirs.tzinfo is None:
        theirs = theirs.replace(tzinfo=datetime.UTC)
    ahead_s = (time.time() if now_s is None else now_s) - theirs.timestamp()
    if abs(ahead_s) <= CLOCK_S:
        return fine("clock", f"agrees with the coordinator's within {max(1, round(abs(ahead_s)))} s")
    way = "ahead of" if ahead_s > 0 else "behind"
    found = f"{abs(ahead_s) / 60:.0f} minutes {way} the coordinator's; certificates and logs depend on it"
    return warning("clock", found, "switch on network time; on Linux: timedatectl set-ntp true")


def data_check(path: Path, federation: Federation | None) -> Check:
    """Whether the data file parses, and what it holds."""
    try:
        examples = load_examples(path)
    except InputError as error:
        return not_fine("data", str(error), "mend that line, or name another file with --data")
    plain = sum(example.text is not None for example in examples)
    kinds = {"conversations": len(examples) - plain, "plain texts": plain}
    text = f"{path}: " + " and ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    if federation and len(examples) < federation.training.batch:
        found = f"{text}; a step takes {federation.training.batch}, so that each is used more than once"
        return warning("data", found, "add examples if you have more")
    return fine("data", text)


def model_check(options: Options, federation: Federation | None, digests: Path) -> Check:
    """Whether the base model is here, whole, and the federation's."""
    from edge_sdk.membership.identity import fingerprint, model_of

    try:
        name = model_of(federation, options) if federation else options.model or files.TINY
        directory = files.find(name)
        if directory is None:
            found = f"{name} is not on this machine yet; joining downloads it"
            return warning("base model", found, f"to have it beforehand: hf download {name}")
        size = human_bytes(needed_files_bytes(directory))
        files.require_no_code(directory, options.trust_remote_code)
        if federation is None:
            return fine("base model", f"{name}: configuration, tokeniser and weights, {size}")
        federation.base.require(fingerprint(federation, options, digests))
    except TheirFault as error:
        mend = "name the federation's base with --model, or leave --model out"
        return not_fine("base model", str(error), mend)
    return fine("base model", f"{name}: the federation's, {size}")


def needed_files_bytes(directory: Path) -> int:
    """Size of what loading a model reads.

    Raises:
        InputError: a file is missing or unreadable.
    """
    files.read_config(directory)
    tokenizer = files.tokenizer_files(directory)
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & {path.name for path in tokenizer}:
        raise InputError(f"{directory}: holds no tokeniser; download the model again")
    return sum(path.stat().st_size for path in (*tokenizer, *files.weight_files(directory)))


def rank_check(federation: Federation, options: Options, quantise: bool) -> Check:
    """The rank that this device would choose."""
    from edge_sdk.participation import decision

    try:
        choice = decision.choose_rank(federation, options, quantise)
    except InputError as error:
        return not_fine("rank", str(error), "close other programs, or join with a larger --memory-budget")
    return fine("rank", choice.reason)


def disk_needed_bytes(federation: Federation | None) -> int:
    """What a device keeps: two downloaded adapters, a checkpoint and a finished adapter, and a reserve."""
    if federation is None:
        return RESERVE_BYTES
    live = adapter_values(federation.base.modules, federation.rank_cap)
    trained = adapter_values(federation.base.modules, max(federation.ladder))
    return RESERVE_BYTES + 2 * ADAPTER_BYTES * live + (CHECKPOINT_BYTES + ADAPTER_BYTES) * trained


def adapter_values(modules: Mapping[str, tuple[int, int]], rank: int) -> int:
    """Values of an adapter: (out + in) × rank of each module, where one narrower has min(out, in)."""
    return sum((o + i) * min(rank, o, i) for o, i in modules.values())
