"""Measures what the owner's conditions ask about: power, the load of other programs, the link, the time."""

from __future__ import annotations

import datetime
import math
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable

import psutil

from edge_sdk.conditions import Conditions, Surroundings, why_not

LOOK_EVERY_S = 3.0
CPU_AVERAGE_S = 15.0  # time constant of the average load: a page that loads is no reason to pause
SHORTEST_CPU_SPAN_S = 0.5  # the kernel counts in hundredths of a second
LINK_EVERY_S = 30.0
LINK_PATIENCE_S = 2.0


class Observer:
    """Looks around now and then. One thread at a time.

    Attributes:
        times: (clock, busy, total, own) in seconds when the load was last read, summed over all processors.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.times = self._cpu_times()
        self._load: float | None = None
        self._metered: bool | None = None
        self._link_due = 0.0

    def look(self, conditions: Conditions) -> Surroundings:
        """Measure what `conditions` ask about, and nothing else."""
        power = conditions.on_mains or conditions.battery_above is not None
        battery = psutil.sensors_battery() if power and hasattr(psutil, "sensors_battery") else None
        plugged = None if battery is None else battery.power_plugged
        return Surroundings(
            on_mains=plugged,
            battery_percent=None if battery is None else float(battery.percent),
            others_cpu_percent=self._others() if conditions.cpu_below is not None else None,
            time=datetime.datetime.now().astimezone().time() if conditions.hours else None,
            metered=self._link() if conditions.unmetered else None,
        )

    def _cpu_times(self) -> tuple[float, float, float, float]:
        """(clock, busy, total, own) in seconds; the last three summed over all processors."""
        times = psutil.cpu_times()._asdict()
        # Linux counts a guest's time in `user` and `nice` too.
        total = sum(value for name, value in times.items() if not name.startswith("guest"))
        idle = times["idle"] + times.get("iowait", 0.0)
        own = self._process.cpu_times()
        return time.monotonic(), total - idle, total, own.user + own.system

    def _others(self) -> float | None:
        """Percent of all processors that other processes use, averaged; None before there is a span."""
        before, now = self.times, self._cpu_times()
        span_s = now[0] - before[0]
        if span_s >= SHORTEST_CPU_SPAN_S:
            self.times = now
            self._load = averaged(self._load, others_percent(before[1:], now[1:]), span_s)
        return self._load

    def _link(self) -> bool | None:
        if time.monotonic() >= self._link_due:
            self._metered = metered()
            self._link_due = time.monotonic() + LINK_EVERY_S
        return self._metered


def others_percent(before: tuple[float, float, float], now: tuple[float, float, float]) -> float:
    """Share of all processors' time between two readings of (busy, total, own) that others used, 0 to 100."""
    busy, total, own = (b - a for a, b in zip(before, now, strict=True))
    return 100 * min(1.0, max(0.0, busy - own) / total) if total > 0 else 0.0


def averaged(average: float | None, value: float, span_s: float) -> float:
    """Exponential moving average over about CPU_AVERAGE_S; `value` held for the last `span_s`."""
    if average is None:
        return value
    weight = 1 - math.exp(-span_s / CPU_AVERAGE_S)
    return average + weight * (value - average)


def metered() -> bool | None:
    """Whether some connection costs by volume, as NetworkManager knows or guesses; None where it is not.

    Windows and macOS know it too, but tell it through their own frameworks only: None there.
    """
    nmcli = shutil.which("nmcli")
    if nmcli is None:
        return None
    try:
        done = subprocess.run(
            [nmcli, "-t", "-f", "GENERAL.METERED", "device", "show"],
            env=os.environ | {"LC_ALL": "C"},
            capture_output=True,
            text=True,
            timeout=LINK_PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return metered_in(done.stdout) if done.returncode == 0 else None


def metered_in(text: str) -> bool | None:
    """What `nmcli -t -f GENERAL.METERED device show` says: `yes`, `no (guessed)`, … for each device."""
    values = [line.partition(":")[2] for line in text.splitlines() if line.startswith("GENERAL.METERED:")]
    if any(value.startswith("yes") for value in values):
        return True
    return False if any(value.startswith("no") for value in values) else None


class Watch:
    """Whether training has to wait: because the application said so, or because a condition does not hold.

    `pause` and `resume` may be called from any thread, `reason` and `look` from the agent's.

    Args:
        conditions: the owner's.
        measure: what they ask about, now.
        clock: tells seconds; it is measured every LOOK_EVERY_S.
    """

    def __init__(
        self,
        conditions: Conditions,
        measure: Callable[[Conditions], Surroundings],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._conditions, self._measure, self._clock = conditions, measure, clock
        self._asked = threading.Event()
        self._reason: str | None = None
        self._due = 0.0

    def pause(self) -> None:
        """Wait until `resume`, whatever the conditions."""
        self._asked.set()

    def resume(self) -> None:
        """Take `pause` back; the conditions still count."""
        self._asked.clear()

    @property
    def asked(self) -> bool:
        """Whether `pause` was called and not taken back."""
        return self._asked.is_set()

    def look(self) -> Surroundings:
        """Measure now."""
        return self._measure(self._conditions)

    def reason(self) -> str | None:
        """Why training has to wait; None where it need not. Measures at most every few seconds."""
        if self._asked.is_set():
            return "asked to"
        if self._conditions != Conditions() and self._clock() >= self._due:
            self._reason = why_not(self._conditions, self.look(), paused=self._reason is not None)
            self._due = self._clock() + LOOK_EVERY_S
        return self._reason
