"""The flags of `edge-sdk profile --model` as a question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_sdk.commands.device_config import DeviceConfig
from edge_sdk.core.errors import InputError
from edge_sdk.core.messages import Training
from edge_sdk.diagnosis.model_fit import Question

LADDER = (2, 4, 8, 16, 32)


def question(flags: Mapping[str, Any]) -> Question:
    """A question from flags by name; None is a flag that was not given.

    Raises:
        InputError: a value that cannot be; names the flag.
    """
    for name in ("rank_cap", "steps", "batch", "sequence_len", "deadline"):
        value = flags[name]
        if value is not None and not value >= 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be 1 or more")
    if flags["rank"] and flags["ladder"]:
        raise InputError("give --rank, which is one rank, or --ladder, not both")
    names = ("profile", "memory_budget", "rank", "device", "threads", "quantise")
    chosen = DeviceConfig(**{name: flags[name] for name in names}).options()
    training = {name: flags[name] for name in ("steps", "batch", "sequence_len") if flags[name]}
    return Question(
        model=flags["model"],
        options=chosen,
        ladder=parse_ladder(flags["ladder"]) if flags["ladder"] is not None else LADDER,
        training=Training(**training),
        deadline_s=flags["deadline"],
        calibrate=not flags["quick"],
        **{name: flags[name] for name in ("rule", "rank_cap") if flags[name]},
    )


def parse_ladder(text: str) -> tuple[int, ...]:
    """`2,4,8` as ranks.

    Raises:
        InputError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"ladder {text!r}: write ranks like 2,4,8,16")
    return tuple(int(part) for part in parts)
