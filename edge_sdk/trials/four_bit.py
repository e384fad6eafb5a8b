"""Does 4-bit training work on this device? Tried for real, once, before anything depends on it.

Wheels of bitsandbytes that import and then fail at the first kernel are a known trouble. The trial
(`four_bit_child`) runs in a process of its own: a kernel that kills its process kills nothing else. It took
4.6 s on two cores, nearly all of it importing, so a success is remembered for the versions and the device
that it was found with. A failure is not remembered: what mends it need not change a version.
"""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edge_sdk.core.errors import InputError
from edge_sdk.machine.processor import cpu_name
from edge_sdk.system import child_process
from edge_sdk.system.terminal import logger
from edge_sdk.trials.findings import recall, remember

log = logger("edge_sdk")

TRIAL_S = 180.0  # a first start on a slow disk reads a GB of libraries
REMEMBERED = "four-bit.json"


@dataclass(frozen=True)
class FourBitTrial:
    """Whether NF4 layers can be trained through, and if not, why in one line.

    `importable`: whether bitsandbytes can at least be imported without harm to the process.
    """

    ok: bool
    reason: str
    seconds: float
    importable: bool = True
    remembered: bool = False


def four_bit_works(device: str = "auto", folder: Path | None = None) -> FourBitTrial:
    """Whether bitsandbytes can quantise, multiply and give gradients on this torch device.

    Args:
        device: as in `Options.device`.
        folder: where successes are remembered; None tries it anew.

    Raises:
        InputError: torch has no such device.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return FourBitTrial(False, "bitsandbytes is not installed", 0.0, importable=False)
    key = installation(device)
    known = recall(folder / REMEMBERED).get(key) if folder is not None else None
    if isinstance(known, int | float):
        return FourBitTrial(True, "", float(known), remembered=True)
    began = time.monotonic()
    importable, reason = _try(device)
    seconds = round(time.monotonic() - began, 1)
    if folder is not None and not reason:
        remember(folder / REMEMBERED, key, seconds)
    return FourBitTrial(not reason, reason, seconds, importable)


def _try(device: str) -> tuple[bool, str]:
    """(bitsandbytes can be imported, what is wrong or "") of a trial in a child process."""
    from edge_sdk.trials.four_bit_child import IMPORTED

    try:
        outcome = child_process.run_python("-m", "edge_sdk.trials.four_bit_child", device, timeout_s=TRIAL_S)
    except InputError as error:
        return True, str(error)
    importable = IMPORTED in outcome.lines
    if outcome.failure:
        place = "at its first kernels" if importable else "when it was imported"
        return importable, f"bitsandbytes failed {place}: {outcome.failure}"
    wrong = str(json.loads(outcome.lines[-1])["wrong"])
    return importable, f"bitsandbytes computes wrongly: {wrong}" if wrong else ""


def installation(device: str) -> str:
    """What a finding holds for: versions, this very installation, and the device by its name."""
    import torch

    from edge_sdk.machine.torch_device import torch_device

    place = torch_device(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else cpu_name()
    spec = importlib.util.find_spec("bitsandbytes")
    origin = Path(spec.origin) if spec and spec.origin else None
    installed = origin.stat().st_mtime_ns if origin and origin.exists() else 0
    try:
        version = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return f"bitsandbytes {version} of {origin} {installed} | torch {torch.__version__} | {place} {name}"
