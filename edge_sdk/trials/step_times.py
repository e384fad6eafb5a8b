"""Step times of this machine for one model: measured in a child, once, and remembered.

The calibration (`step_times_child`) takes some seconds and builds a piece of the model; so a child does it,
once for the model, the ways of training that may be chosen, the versions and the device.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.core.choice.setting import Ranks
from edge_sdk.core.choice.step_time import StepTime
from edge_sdk.core.errors import ProtocolError
from edge_sdk.core.messages import Training
from edge_sdk.core.records import decode, encode, from_json, to_json
from edge_sdk.core.version import __version__
from edge_sdk.system import child_process
from edge_sdk.system.hidden_library import hide_bitsandbytes
from edge_sdk.system.terminal import logger
from edge_sdk.trials.findings import recall, remember
from edge_sdk.trials.four_bit import installation

log = logger("edge_sdk")

MEASURE_S = 300.0
REMEMBERED = "step-times.json"


@dataclass(frozen=True)
class Trial:
    """What is to be timed."""

    config: str  # the text of config.json
    ranks: tuple[Ranks, ...]
    batch: int
    sequence_len: int
    carries: bool
    device: str
    quantise: bool
    threads: int


def trial(
    config: Path, training: Training, ranks: Sequence[Ranks], carries: bool, way: tuple[str, bool, int]
) -> Trial:
    """A trial for a federation's training; `way` is (device, 4 bits, threads)."""
    text = config.read_text(encoding="utf-8")
    return Trial(text, tuple(ranks), training.batch, training.sequence_len, carries, *way)


def measured(wanted: Trial, folder: Path) -> StepTime | None:
    """The constants of `core.choice.step_time` on this machine; None, and a log line, where that fails.

    Without them the choice of rank knows no deadline; that is no reason not to train.
    """
    asked = json.dumps(to_json(wanted), sort_keys=True)
    key = hashlib.sha256(f"{__version__} {asked} {installation(wanted.device)}".encode()).hexdigest()
    try:
        return from_json(StepTime, recall(folder / REMEMBERED).get(key))
    except ProtocolError:
        log.debug("step times are not known yet")
    outcome = child_process.run_python("-m", "edge_sdk.trials.step_times", asked, timeout_s=MEASURE_S)
    if outcome.failure or not outcome.lines:
        log.warning("step times cannot be measured: %s", outcome.failure or "the trial said nothing")
        return None
    found = decode(StepTime, outcome.lines[-1])
    remember(folder / REMEMBERED, key, to_json(found))
    return found


def main() -> int:
    """`python -m edge_sdk.trials.step_times TRIAL`: measure; the last line is the JSON."""
    wanted = decode(Trial, sys.argv[1])
    if not wanted.quantise:  # nothing here needs it, and where it is broken its import may end the process
        hide_bitsandbytes()
    from edge_sdk.model import base_model
    from edge_sdk.trials import step_times_child

    base_model.use_threads(wanted.threads)
    largest = step_times_child.LargestStep(wanted.batch, wanted.sequence_len, wanted.ranks, wanted.carries)
    found = step_times_child.step_times(json.loads(wanted.config), largest, wanted.device, wanted.quantise)
    sys.stdout.write(encode(found).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
