"""What the libraries alone take of a training process: measured in a child, and remembered.

The measurement (`baseline`) trains twice on almost nothing, which takes 8 s and more memory than an
application may want to hold; so that a child does it, once for the versions and the device that it is of.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from edge_sdk import __version__, child
from edge_sdk.core.errors import InternalError
from edge_sdk.journal import write_durably
from edge_sdk.preflight import installation

log = logging.getLogger("edge_sdk")

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
    if folder is not None and key in (known := _load(folder / REMEMBERED)):
        return known[key]
    outcome = child.run_python("-m", "edge_sdk.baseline", device, way, timeout_s=MEASURE_S)
    if outcome.failure or not outcome.lines:
        raise InternalError(
            f"the memory of the libraries cannot be measured: {outcome.failure or 'it said nothing'}; "
            "`edge-sdk doctor` says more"
        )
    measured = int(json.loads(outcome.lines[-1])["bytes"])
    if folder is not None:
        _remember(folder, key, measured)
    return measured


def _load(path: Path) -> dict[str, int]:
    """What was remembered; a missing or damaged file only means that it is measured again."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    items = known.items() if isinstance(known, dict) else ()
    return {key: value for key, value in items if type(value) is int and value >= 0}


def _remember(folder: Path, key: str, measured: int) -> None:
    """Add a measurement. A folder that cannot be written costs the next start some seconds, nothing else."""
    path = folder / REMEMBERED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(_load(path) | {key: measured}, indent=1).encode())
    except OSError as error:
        log.warning("%s: cannot be written (%s); it is measured again next time", path, error.strerror)
