"""Where a training run stands, on disk, so that a crash repeats at most the seconds since the last write.

One safetensors file: float32 tensors (factors and optimiser moments), and in its metadata the counters and
the identity of the run, by which a later run tells whether it may go on from there.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edge_sdk.core.errors import ProtocolError
from edge_sdk.core.lora import Matrix
from edge_sdk.core.records import decode
from edge_sdk.system.durable import write_durably

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Counters of a run. `seconds` is computing time, over all its parts.

    `adam_since`: the step after which the optimiser began, above 0 where a run went on at another rank.
    """

    step: int
    examples: int
    loss_first: float
    loss_last: float
    seconds: float
    adam_since: int = 0


@dataclass(frozen=True)
class Kept:
    """What a checkpoint holds."""

    identity: dict[str, Any]
    progress: Progress
    tensors: dict[str, Matrix]


def write(path: Path, identity: Mapping[str, Any], progress: Progress, tensors: Mapping[str, Matrix]) -> None:
    """Replace the checkpoint at `path`; a kill leaves the old or the new one.

    Raises:
        Unwritable: the old one is there.
    """
    metadata = {
        "identity": json.dumps(identity, sort_keys=True),
        "progress": json.dumps(dataclasses.asdict(progress)),
    }
    write_durably(path, save(dict(tensors), metadata=metadata))


def read(path: Path, accepts: Callable[[Mapping[str, Any]], bool]) -> Kept | None:
    """What `write` left, or None if there is no file, or it is damaged or of another run (logged).

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
            return Kept(identity, progress, tensors)
    except (SafetensorError, ValueError, ProtocolError) as error:
        log.warning("%s cannot be read (%s); starting the assignment from its beginning", path, error)
        return None
