"""What the doctor looks at on the machine: Python, libraries, the device, 4-bit training, memory, disk."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from edge_sdk.core.choice.memory import human_bytes
from edge_sdk.core.errors import InputError
from edge_sdk.core.profile import DeviceProfile
from edge_sdk.diagnosis.check import Check, fine, not_fine, warning
from edge_sdk.system import child_process
from edge_sdk.trials.four_bit import FourBitTrial

DISTRIBUTION = "flexlora-edge"
INSTALL = f'python -m pip install -U "{DISTRIBUTION}[edge]"'
TORCH_BUILDS = "https://pytorch.org/get-started/locally/"
# bitsandbytes is not among them: without it training goes on unquantised, and the 4-bit trial reports it.
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "httpx", "cryptography", "psutil")
IMPORT_S = 180.0

# Resident memory of a process that has imported every library: 0.4 GB (measured, Linux, CPU build of torch).
LIBRARIES_BYTES = 400_000_000
SCARCE_BYTES = 1_500_000_000

# Imports one module after the other and says how it went, so that a crash leaves the culprit known. Hidden
# from the others, a broken bitsandbytes fails alone.
IMPORTS = """
import importlib, sys
from edge_sdk.core.errors import first_line
from edge_sdk.system.hidden_library import hide_bitsandbytes
hide_bitsandbytes()
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        print(name, f"{type(error).__name__}: {first_line(error, 200)}", sep="\\t", flush=True)
    else:
        print(name, "", sep="\\t", flush=True)
"""


def python_check() -> Check:
    """The interpreter: PyTorch has no 32-bit builds."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.maxsize <= 2**32:
        return not_fine(
            "python", f"{version}, 32 bits; PyTorch needs 64", "install a 64-bit system and its Python"
        )
    return fine("python", f"{version}, {sys.executable}")


def library_checks() -> Iterator[tuple[str, Check]]:
    """(name, check) of each library that is missing, old or does not import; then "" with the good ones."""
    wanted, good = minimum_versions(), []
    for name, problem in import_problems(LIBRARIES).items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, not_fine(name, "not installed", INSTALL)
            continue
        if problem:
            mend = f"python -m pip install --force-reinstall {name}=={version}"
            yield name, not_fine(name, f"{version} cannot be imported: {problem}", mend)
        elif version_numbers(version) < version_numbers(wanted.get(name, "0")):
            yield name, not_fine(name, f"{version} is too old, {wanted[name]} is needed", INSTALL)
        else:
            good.append(f"{name} {version}")
    if good:
        yield "", fine("libraries", ", ".join(good))


def import_problems(names: Sequence[str]) -> dict[str, str]:
    """Why each module cannot be imported ("" where it can), tried in processes of their own."""
    found: dict[str, str] = {}
    while rest := [name for name in names if name not in found]:
        outcome = child_process.run_python("-c", IMPORTS, *rest, timeout_s=IMPORT_S)
        for line in outcome.lines:
            name, tab, problem = line.partition("\t")
            if tab and name in rest:
                found[name] = problem
        if outcome.failure:  # the first that it did not come to speak of ended it
            culprit = next((name for name in rest if name not in found), rest[-1])
            found[culprit] = outcome.failure
    return {name: found[name] for name in names}


def minimum_versions() -> dict[str, str]:
    """Library -> least version, as this package's own metadata says; empty where it has none."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    pairs = (re.match(r"([\w-]+)>=([\d.]+)", text) for text in requirements)
    return {pair.group(1): pair.group(2) for pair in pairs if pair}


def version_numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu as (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def device_check(name: str, device: DeviceProfile) -> Check:
    """Where training would run, and in which dtype."""
    from edge_sdk.machine.torch_device import dtype_name, torch_device

    try:
        place = torch_device(name)
    except InputError as error:
        return not_fine("device", str(error), f"leave out --device, or take the right build: {TORCH_BUILDS}")
    chosen = device.accelerators[place.index or 0] if place.type != "cpu" and device.accelerators else None
    text = f"{place}, {chosen.name if chosen else device.cpu}, computes in {dtype_name(place)}"
    if chosen is None and name == "auto" and shutil.which("nvidia-smi"):
        found = f"{text}; an NVIDIA driver is here, but this torch sees no GPU"
        return warning("device", found, f"install a CUDA build of torch: {TORCH_BUILDS}")
    return fine("device", text)


def four_bit_check(tried: FourBitTrial, otherwise: str = "") -> Check:
    """What the 4-bit trial found. `otherwise`: why unquantised training is impossible too, or empty."""
    try:
        version = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        version = ""
    if tried.ok:
        text = f"bitsandbytes {version} quantises, multiplies and gives right gradients ({tried.seconds} s)"
        return fine("4-bit", text)
    pin = f"bitsandbytes=={version}" if version else "bitsandbytes"
    mend = f"python -m pip install --force-reinstall {pin}" if version else INSTALL
    if otherwise:
        return not_fine("4-bit", f"{tried.reason}; and unquantised, {otherwise}", mend)
    return warning("4-bit", f"{tried.reason}; training goes on unquantised where that fits", mend)


def memory_check(device: DeviceProfile) -> Check:
    """What is free where training would run, and swap apart."""
    free, total = device.trainable_memory_bytes(), device.trainable_memory_total_bytes()
    where = "accelerator memory" if device.accelerator else "memory"
    text = f"{human_bytes(free)} of {human_bytes(total)} {where} free"
    if device.swap_total_bytes:
        text += f", swap {human_bytes(device.swap_free_bytes or 0)} of {human_bytes(device.swap_total_bytes)}"
    available = device.memory_available_bytes
    if available is not None and available < LIBRARIES_BYTES:
        found = (
            f"{text}; {human_bytes(available)} of RAM free, the libraries take {human_bytes(LIBRARIES_BYTES)}"
        )
        return not_fine("memory", found, "close other programs")
    if free < SCARCE_BYTES:
        return warning("memory", f"{text}; half of it is the default budget", "close other programs")
    return fine("memory", text)


def disk_check(folder: Path, needed_bytes: int) -> Check:
    """Room and write permission where the device keeps its state."""
    from edge_sdk.machine.probe import disk_free_bytes, existing

    place, free = existing(folder), disk_free_bytes(folder)
    text = f"{human_bytes(free)} free at {folder}, {human_bytes(needed_bytes)} needed"
    if free < needed_bytes:
        return not_fine("disk", text, "free some space, or name a folder on another disk with --state")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(os.urandom(4096))
            file.flush()
    except OSError as error:
        found = f"{place} cannot be written: {error.strerror}"
        return not_fine("disk", found, "name a folder of your own with --state")
    return fine("disk", text)
