"""What the libraries alone take of a training process: measured in a child, and remembered.

The measurement (`library_memory_child`) trains twice on almost nothing, which takes 8 s and more memory than
an application may want to hold; so a child does it, once for the versions and the device that it is of.
"""

from __future__ import annotations

import json
from pathlib import Path

from edge_sdk.core.errors import InternalError
from edge_sdk.core.version import __version__
from edge_sdk.system import child_process
from edge_sdk.trials.findings import recall, remember
from edge_sdk.trials.four_bit import installation

MEASURE_S = 300.0
REMEMBERED = "framework-memory.json"


def framework_bytes(device: str, quantise: bool, folder: Path | None = None) -> int:
    """Bytes that training takes here before it holds anything of a model.

    Args:
        device: as in `Options.device`.
        quantise: whether the base will be in 4 bits.
        folder: where measurements are remembered; None measures anew.

    Raises:
        InputError: torch has no such device, or this application has no interpreter to start.
        InternalError: the measurement failed; says how its process ended.
    """
    way = "4-bit" if quantise else "whole"
    key = f"edge-sdk {__version__} {way} | {installation(device)}"
    known = recall(folder / REMEMBERED).get(key) if folder is not None else None
    if type(known) is int and known >= 0:
        return known
    outcome = child_process.run_python(
        "-m", "edge_sdk.trials.library_memory_child", device, way, timeout_s=MEASURE_S
    )
    if outcome.failure or not outcome.lines:
        raise InternalError(
            f"the memory of the libraries cannot be measured: {outcome.failure or 'it said nothing'}; "
            "`edge-sdk doctor` says more"
        )
    measured = int(json.loads(outcome.lines[-1])["bytes"])
    if folder is not None:
        remember(folder / REMEMBERED, key, measured)
    return measured
