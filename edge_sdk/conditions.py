"""When a device may train: the owner's conditions, what was measured, and the decision. Pure.

`machine.surroundings` measures. What cannot be measured on a machine (None) holds nothing back; `unmeasured`
names it, so that the owner hears of it once.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass

from edge_sdk.core.errors import InputError

# Training that pauses at a limit goes on only a little way from it, or it would flap.
CPU_RESUMES_AT = 0.8  # of `cpu_below`
BATTERY_RESUMES_AT = 3  # percentage points over `battery_above`, where there are as many

HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True)
class Conditions:
    """What must hold while a device trains; the defaults ask for nothing.

    Args:
        on_mains: not on battery power.
        battery_above: charge in percent, whether it is being charged or not.
        cpu_below: percent of all processors together that other programs use, on average.
        hours: local time, e.g. `22:00-07:00`, the end not included.
        unmetered: not on a link that costs by volume, as far as the system says so.

    Raises:
        InputError: a percentage or an interval that cannot be one.
    """

    on_mains: bool = False
    battery_above: int | None = None
    cpu_below: int | None = None
    hours: str | None = None
    unmetered: bool = False

    def __post_init__(self) -> None:
        if self.battery_above is not None and not 0 <= self.battery_above <= 99:
            raise InputError(f"battery_above {self.battery_above} must be a percentage from 0 to 99")
        if self.cpu_below is not None and not 1 <= self.cpu_below <= 100:
            raise InputError(f"cpu_below {self.cpu_below} must be a percentage from 1 to 100")
        if self.hours is not None:
            _interval(self.hours)


@dataclass(frozen=True)
class Surroundings:
    """What was measured; None where it was not asked for, or the machine does not tell."""

    on_mains: bool | None = None
    battery_percent: float | None = None
    others_cpu_percent: float | None = None
    time: datetime.time | None = None  # local
    metered: bool | None = None


def why_not(conditions: Conditions, now: Surroundings, paused: bool = False) -> str | None:
    """Why training has to wait, as a person would say it; None where it need not.

    Args:
        conditions: the owner's.
        now: as measured.
        paused: whether training waits already; the limits to go on are then a little stricter.
    """
    checks = (_mains, _battery, _processors, _clock, _link)
    reasons = [reason for check in checks if (reason := check(conditions, now, paused))]
    return "; ".join(reasons) or None


def _mains(conditions: Conditions, now: Surroundings, paused: bool) -> str | None:
    return "on battery power" if conditions.on_mains and now.on_mains is False else None


def _battery(conditions: Conditions, now: Surroundings, paused: bool) -> str | None:
    least, level = conditions.battery_above, now.battery_percent
    if least is None or level is None:
        return None
    enough = min(99, least + BATTERY_RESUMES_AT)  # to go on
    if level > (enough if paused else least):
        return None
    return f"battery at {level:.0f} %, waiting for more than {enough} %"


def _processors(conditions: Conditions, now: Surroundings, paused: bool) -> str | None:
    most, load = conditions.cpu_below, now.others_cpu_percent
    if most is None or load is None:
        return None
    calm = most * CPU_RESUMES_AT  # to go on
    if load < (calm if paused else most):
        return None
    return f"other programs use {load:.0f} % of the processors, waiting for less than {calm:.0f} %"


def _clock(conditions: Conditions, now: Surroundings, paused: bool) -> str | None:
    if conditions.hours is None or now.time is None or within(conditions.hours, now.time):
        return None
    return f"outside the hours {conditions.hours}"


def _link(conditions: Conditions, now: Surroundings, paused: bool) -> str | None:
    return "the network link is metered" if conditions.unmetered and now.metered else None


def unmeasured(conditions: Conditions, now: Surroundings) -> tuple[str, ...]:
    """Conditions that this machine gives no answer to, and that therefore hold nothing back.

    The processor load is measured between two looks, so that the first one has none.
    """
    missing = []
    if conditions.on_mains and now.on_mains is None:
        missing.append("whether it is on mains power")
    if conditions.battery_above is not None and now.battery_percent is None:
        missing.append("how full a battery is")
    if conditions.unmetered and now.metered is None:
        missing.append("whether the network link is metered")
    return tuple(missing)


def within(hours: str, time: datetime.time) -> bool:
    """Whether `time` lies in an interval such as `22:00-07:00`, which may go over midnight."""
    begin, end = _interval(hours)
    minute = time.hour * 60 + time.minute
    return begin <= minute < end if begin < end else minute >= begin or minute < end


def _interval(hours: str) -> tuple[int, int]:
    """Begin and end in minutes from midnight."""
    found = HOURS.fullmatch(hours)
    if not found:
        raise InputError(f"hours {hours!r} is no interval; write it like 22:00-07:00")
    begin_h, begin_m, end_h, end_m = map(int, found.groups())
    begin, end = begin_h * 60 + begin_m, end_h * 60 + end_m
    if begin == end:
        raise InputError(f"hours {hours!r} begins when it ends; leave it out to train at any time")
    return begin, end
