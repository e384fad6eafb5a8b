"""Where a training run stands, on disk, so that a crash repeats at most the seconds since the last write.

One safetensors file: float32 tensors (factors and optimiser moments), and in its metadata the counters and
the identity of the run, by which a later run tells whether it may go on from there.

A run that ran out of memory goes on at a smaller setting: lower ranks, shorter rows, another optimiser. What
it has learnt is the product B·A of each module, and that is kept as well as the lower rank allows: the
truncated SVD is the best approximation (Eckart and Young 1936). Counters go on where they were.

Adam starts anew where a rank changes. Its moments are kept for each entry of the old factors; the SVD turns
these into other directions, and a second moment, a mean of squares entry by entry, does not turn with them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edge_sdk.core.choice.setting import Ranks
from edge_sdk.core.errors import InputError, ProtocolError
from edge_sdk.core.flexlora import combine, serve
from edge_sdk.core.lora import Adapter, LoraFactors, Matrix
from edge_sdk.core.ranges import Count, Loss, Seconds
from edge_sdk.core.records import decode
from edge_sdk.system.durable import write_durably
from edge_sdk.system.terminal import logger

log = logger(__name__)


@dataclass(frozen=True)
class Progress:
    """Counters of a run. `seconds` is computing time, over all its parts.

    `adam_since`: the step after which the optimiser began, above 0 where a run went on at another rank.
    """

    step: Count
    examples: Count
    loss_first: Loss
    loss_last: Loss
    seconds: Seconds
    adam_since: Count = 0


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds."""

    identity: dict[str, Any]
    progress: Progress
    tensors: dict[str, Matrix]


def write_checkpoint(
    path: Path, identity: Mapping[str, Any], progress: Progress, tensors: Mapping[str, Matrix]
) -> None:
    """Replace the checkpoint at `path`; a kill leaves the old or the new one.

    Raises:
        Unwritable: the old one is there.
    """
    metadata = {
        "identity": json.dumps(identity, sort_keys=True),
        "progress": json.dumps(dataclasses.asdict(progress)),
    }
    write_durably(path, save(dict(tensors), metadata=metadata))


def read_checkpoint(path: Path, accepts: Callable[[Mapping[str, Any]], bool]) -> Checkpoint | None:
    """What `write_checkpoint` left, or None if there is no file, or it is damaged or of another run (logged).

    `accepts` is given the file's identity before a tensor is read.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            identity = json.loads(metadata.get("identity", "null"))
            if not (isinstance(identity, dict) and accepts(identity)):
                log.info("%s belongs to another assignment; starting this one from its beginning", path)
                return None
            progress = decode(Progress, metadata.get("progress", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Checkpoint(identity, progress, tensors)
    except (SafetensorError, ValueError, ProtocolError) as error:
        log.warning("%s cannot be read (%s); starting the assignment from its beginning", path, error)
        return None


# --- continued by a run that is set up otherwise --------------------------------------------------

# What a smaller setting may change. `factors` and `text` follow from the first two: factors are digested at
# their rank, rows at their length. `origin` and `rows` are their shares that stay.
OF_THE_SETTING = frozenset({"ranks", "sequence_len", "optimizer", "carried_dtype", "factors", "text"})


def may_continue(kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a run marked `wanted` may go on from a checkpoint marked `kept` (see `plan.identity`).

    It may if they are the same, or the same assignment at ranks and a sequence length no larger.
    """
    if kept == wanted:
        return True
    fixed = (kept.keys() | wanted.keys()) - OF_THE_SETTING
    if any(kept.get(key) != wanted.get(key) for key in fixed) or not _no_larger(kept, wanted):
        return False
    same_length = kept["sequence_len"] == wanted["sequence_len"]
    return not same_length or kept["text"] == wanted["text"]


def _no_larger(kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    try:
        before, now = Ranks.parse(kept["ranks"]), Ranks.parse(wanted["ranks"])
        longer = int(wanted["sequence_len"]) > int(kept["sequence_len"])
    except (KeyError, TypeError, ValueError, InputError):
        return False  # a checkpoint of an earlier form
    return now.attention <= before.attention and now.mlp <= before.mlp and not longer


def refitted(
    kept: Checkpoint, wanted: Mapping[str, Any], adapter: Adapter
) -> tuple[Progress, Mapping[str, Matrix]]:
    """Counters and tensors of `kept` for a run whose modules have the ranks of `adapter`.

    Where ranks or optimiser differ, the tensors are the factors alone and `adam_since` is the present step.
    """
    if all(kept.identity.get(key) == wanted.get(key) for key in ("ranks", "optimizer")):
        return kept.progress, kept.tensors
    tensors: dict[str, Matrix] = {}
    for module, factors in adapter.items():
        before = LoraFactors(kept.tensors[f"{module}.b"], kept.tensors[f"{module}.a"])
        after = _truncated(before, factors.rank, f"{wanted['seed']}/{kept.progress.step}/{module}")
        tensors[f"{module}.b"], tensors[f"{module}.a"] = after.b, after.a
    return replace(kept.progress, adam_since=kept.progress.step), tensors


def _truncated(factors: LoraFactors, rank: int, seed: str) -> LoraFactors:
    """The best approximation of `rank`; where the product has fewer live components, fresh ones fill up."""
    if factors.rank <= rank:
        return factors
    return serve(combine([(1.0, factors)], rank).factors, rank, "sigma_in_b", seed)
