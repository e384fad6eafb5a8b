"""`edge-sdk join --dry-run`: what a federation asks, and exactly what joining would send. Joins nothing.

Only the federation's own record is fetched. Records are made by the code that would send them; what only
training can tell is written as its range.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sdk.connection.transport import Transport
from edge_sdk.core import messages
from edge_sdk.core.choice.memory import human_bytes
from edge_sdk.core.errors import InputError, OurFault, TheirFault, Unreachable
from edge_sdk.core.messages import Ask, Federation
from edge_sdk.core.records import to_json
from edge_sdk.membership import identity, limits
from edge_sdk.membership.journal import SESSION, Journal
from edge_sdk.membership.known_coordinator import trust_in
from edge_sdk.membership.limits import Demand
from edge_sdk.model import files
from edge_sdk.options import Options, default_state_dir
from edge_sdk.participation import decision
from edge_sdk.text.rows import load_examples

NOT_YET = "(worked out once the base is here)"


@dataclass(frozen=True)
class Sent:
    """One request: where to, and its body as JSON, or in words."""

    route: str
    body: str


@dataclass(frozen=True)
class DryRun:
    """What a device would be in for. `stays`: what is never sent."""

    federation: Federation
    demands: tuple[Demand, ...]
    sent: tuple[Sent, ...]
    stays: tuple[str, ...]
    objection: str = ""  # why joining would end before anything is sent


def examine(url: str, token: str | None, data: Path, options: Options, pin: str = "") -> DryRun:
    """Fetch the federation's record from whoever has the pinned key, and work out the rest here.

    Raises:
        InputError: no token, or the data cannot be read.
        Unreachable, TheirFault: nobody answers, or the token is wrong.
    """
    if not token:
        raise InputError("a dry run shows the federation's record, which needs its join token")
    examples = len(load_examples(data))
    state = options.state_dir or default_state_dir(url, options.name)
    known = Journal(state).load() if (state / SESSION).exists() else None
    transport = Transport(url, token, trust=trust_in(url, pin, options, known))
    try:
        federation = transport.federation()
    finally:
        transport.close()
    demands = limits.demands(federation, options.limits)
    stays = (
        f"{data}: {examples} examples, {human_bytes(data.stat().st_size)}; nothing of its text is sent",
        f"the base model, and the adapter's optimiser moments and checkpoints in {state}",
        "which examples an update was trained on, and the loss of any single one",
    )
    sent, objection = _sent(federation, options, state)
    return DryRun(federation, demands, sent, stays, objection)


def _sent(federation: Federation, options: Options, state: Path) -> tuple[tuple[Sent, ...], str]:
    """The requests of joining and of one assignment, in order; and what would stand in the way."""
    objection, fingerprint = "", NOT_YET
    rank, carry_rank = max(federation.ladder, default=1), federation.rank_cap if federation.carries else 0
    try:
        limits.require(federation, options.limits)
        if files.find(identity.model_of(federation, options)) is not None:
            fingerprint = identity.fingerprint(federation, options, state / "digests.json")
            federation.base.require(fingerprint)
            chosen = decision.choose_rank(federation, options, options.quantise)
            rank, carry_rank = chosen.rank, chosen.setting.carry_rank
    except (TheirFault, OurFault, Unreachable) as error:
        objection = str(error)
    joining = to_json(identity.request(fingerprint, options, "a-random-name-of-this-attempt"))
    training = federation.training
    most, size = training.steps * training.batch, limits.upload_bytes(federation, rank)
    update: dict[str, Any] = {
        "digest": "SHA-256 of that file",
        "size_bytes": f"at most {size}",
        "rank": f"at most {rank}",
        "examples": f"at most {most}",
        "steps": f"at most {training.steps}",
        "loss_before": "mean training loss of the first step",
        "loss_after": "mean training loss of the last step",
        "train_s": "seconds",
    }
    assert set(update) == {field.name for field in dataclasses.fields(messages.Update)}
    return (
        Sent(f"POST {messages.JOIN}", _shown(joining)),
        Sent(f"POST {messages.ASSIGNMENTS}", _shown(to_json(Ask(rank, carry_rank)))),
        Sent(f"POST {messages.HEARTBEAT}", _shown({"steps_done": f"0 to {training.steps}"})),
        Sent(f"PATCH {messages.UPLOAD}", f"the trained LoRA factors, at most {size} bytes"),
        Sent(f"POST {messages.UPDATE}", _shown(update)),
    ), objection


def lines(it: DryRun) -> list[str]:
    """As a person reads it, line by line; a stranger's words are within one."""
    federation = it.federation
    ladder = ", ".join(map(str, federation.ladder))
    down = limits.download_bytes(federation)
    said = [
        "Nothing was joined, and nothing but this federation's record was fetched.",
        "",
        f"Federation {federation.id} asks for",
        f"  rule {federation.rule}, ranks {ladder}, cap {federation.rank_cap}",
        f"  a download of at most {down} bytes ({human_bytes(down)}) in {federation.download_dtype}",
        *(
            f"  {'refused' if demand.wrong else 'allowed'}   {demand.what}: {demand.asked} ({demand.limit})"
            for demand in it.demands
        ),
        "",
        "Joining would send, with the token and then the device's credential in the Authorization header",
    ]
    for sent in it.sent:
        said += [f"  {sent.route}", *(f"    {line}" for line in sent.body.splitlines())]
    said += ["", "These never leave this machine", *(f"  {what}" for what in it.stays)]
    said += ["", f"Joining would end here: {it.objection}"] if it.objection else []
    return said


def _shown(body: Any) -> str:
    return json.dumps(body, indent=1, ensure_ascii=False)
