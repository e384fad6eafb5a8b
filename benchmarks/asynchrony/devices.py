"""Devices for a federation in virtual time: classes of `profiles/`, a heavy tail, links.

A class is a sheet without a speed (see `profiles/README.md`), so that speeds are *assumed* here, by one rule
from what the sheet does hold: 15 GFLOP/s for each compute thread; an accelerator that shares the machine's
memory counts as 100 GFLOP/s a thread of its processor, a card with memory of its own as 10 TFLOP/s. Only
ratios matter: the device in the middle trains `MEDIAN_TRAIN_S` an assignment, as if a base had been chosen
for that.

On top comes what a class cannot tell, other programs, heat, an old charger: a step is longer by a factor from
a Pareto distribution (1 at least, exponent 2). Then the tail is put where it is asked for: the slowest device
is made `TAIL` times slower than the one in the middle, and none is slower than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median_low

import numpy as np

from benchmarks.asynchrony.simulation import VirtualDevice
from edge_sdk.core.profile import DeviceProfile, known_profiles, load_profile

THREAD_GFLOPS, SHARED_GFLOPS, CARD_GFLOPS = 15.0, 100.0, 10_000.0
TAIL = 50.0  # the slowest device's step over the median's
PARETO_EXPONENT = 2.0

MEDIAN_TRAIN_S = 600.0
MEDIAN_DOWN_MBIT_S, MEDIAN_UP_MBIT_S, LINK_SIGMA = 50.0, 10.0, 0.8
DOWN_MBIT, UP_MBIT_PER_RANK = 8 * 25.0, 8 * 0.8  # a global adapter of rank 32, and a rank of an update, int8


def gflops(profile: DeviceProfile) -> float:
    """The speed that is assumed of a class."""
    accelerator = profile.accelerator
    if accelerator is None:
        return THREAD_GFLOPS * profile.threads
    return SHARED_GFLOPS * profile.threads if accelerator.shared else CARD_GFLOPS


def draw(ranks: Sequence[int], steps: int, seed: int, tail: float = TAIL) -> list[VirtualDevice]:
    """As many devices as there are ranks, each of a class drawn evenly. `steps`: of an assignment."""
    rng = np.random.default_rng([seed, 3])
    classes = [load_profile(name) for name in known_profiles()]
    devices = []
    for place, rank in enumerate(ranks):
        profile = classes[int(rng.integers(len(classes)))]
        slower = 1.0 + float(rng.pareto(PARETO_EXPONENT))
        down, up = np.exp(LINK_SIGMA * rng.normal(size=2)) * (MEDIAN_DOWN_MBIT_S, MEDIAN_UP_MBIT_S)
        devices.append(
            VirtualDevice(
                f"{place:02d} {profile.name}",
                rank,
                step_s=slower / gflops(profile),
                download_s=float(DOWN_MBIT / down),
                upload_s=float(rank * UP_MBIT_PER_RANK / up),
            )
        )
    unit_s = MEDIAN_TRAIN_S / (steps * median_step_s(devices))
    return with_tail([replace(d, step_s=d.step_s * unit_s) for d in devices], tail)


def with_tail(devices: Sequence[VirtualDevice], tail: float) -> list[VirtualDevice]:
    """The same devices, the slowest `tail` times slower than the median, and none slower than that.

    The median is that of the faster half's last device, so that it is a device's own and stays what it is.
    """
    most = tail * median_step_s(devices)
    slowest = max(device.step_s for device in devices)
    return [
        replace(device, step_s=most) if device.step_s >= min(most, slowest) else device for device in devices
    ]


def median_step_s(devices: Sequence[VirtualDevice]) -> float:
    """Seconds of a step on the device in the middle."""
    return median_low(device.step_s for device in devices)
