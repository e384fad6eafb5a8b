"""How long a device may take, and how much it is given, from what it took before.

A pace is the seconds for each step of an assignment, from the grant to the stored update: the download, the
training and the upload, with the pauses that its owner wants. Slow links and slow processors count alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from coordinator.engine.events import Lease
from coordinator.engine.policy import Policy

KEPT = 8  # paces of a device, so that it may change its habits within some assignments
LEAST_KEPT = 3  # before that many, nobody knows what is usual for a device
LEAST_SPREAD = 0.1  # of the median: equal times so far do not make the next one late by a hair
LEAST_S = 10.0  # a deadline is never shorter: below it the machine's own hiccups count
LEAST_WORK_SHARE = 8  # sized work is never less than the steps divided by this


def pace_limit_s(paces_s: Sequence[float], mads: float) -> float | None:
    """Seconds a step that are still usual: median + k·MAD. None while too little is known.

    The median absolute deviation is not moved by a night with the lid closed, as a standard deviation
    would be.
    """
    if len(paces_s) < LEAST_KEPT:
        return None
    middle = statistics.median(paces_s)
    spread = statistics.median(abs(pace - middle) for pace in paces_s)
    return middle + mads * max(spread, LEAST_SPREAD * middle)


def lease_s(paces_s: Sequence[float], steps: int, policy: Policy, is_new: bool = False) -> float:
    """How long a device gets for an assignment of so many steps; at most `policy.lease_s`.

    `is_new`: it has handed in nothing yet. Whoever asks and never works holds a slot only for so long.
    """
    if is_new:
        return policy.new_lease_s
    limit = pace_limit_s(paces_s, policy.deadline_mads)
    return policy.lease_s if limit is None else min(policy.lease_s, max(LEAST_S, limit * steps))


def extended_to(lease: Lease, now: float, policy: Policy) -> float:
    """When a first lease ends whose device has shown progress, at its `steps_done`.

    It gets what the rest takes at its pace so far, and the time of a first lease for the upload. Progress is
    what a device says of itself, so the whole is at most `policy.lease_s` from the grant.
    """
    rest_s = (now - lease.granted_at) / lease.steps_done * (lease.steps - lease.steps_done)
    whole = min(lease.granted_at + policy.lease_s, now + rest_s + policy.new_lease_s)
    return max(lease.expires_at, whole)


def usual_s(paces_s: Sequence[float], steps: int) -> float:
    """Seconds that a device with at least one pace usually takes for so many steps."""
    return statistics.median(paces_s) * steps


def takes_s(paces_s: Sequence[float], lease: Lease, now: float, policy: Policy) -> float:
    """Seconds that a device takes for the work in hand, as far as can be told; at most `policy.lease_s`.

    What it usually takes; of a first assignment what its progress says, and before any progress the time that
    it was given. Never less than the time since the grant.
    """
    so_far = now - lease.granted_at
    if paces_s:
        whole = usual_s(paces_s, lease.steps)
    elif lease.steps_done:
        whole = so_far * lease.steps / lease.steps_done
    else:
        whole = lease.expires_at - lease.granted_at
    return min(policy.lease_s, max(so_far, whole))


def steps(paces_s: Sequence[float], most: int, policy: Policy) -> int:
    """How many steps a device gets: `most`, or what it usually does within `policy.work_s`.

    An eighth of `most` at least: less would be a download and an upload for next to nothing.
    """
    if policy.work_s is None or len(paces_s) < LEAST_KEPT:
        return most
    usual = int(policy.work_s / max(statistics.median(paces_s), 1e-9))
    return max(1, most // LEAST_WORK_SHARE, min(most, usual))
