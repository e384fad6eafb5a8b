"""What an owner allows: a federation or an assignment beyond it is refused in one line, before anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.commands.device_config import load_device_config
from edge_sdk.core.errors import InputError, Unreachable
from edge_sdk.core.messages import Assignment, Base, Federation, Training
from edge_sdk.membership import limits
from edge_sdk.options import Limits

BASE = Base("org/model", "ab" * 32, {"layers.0.q": (64, 64)})
FEDERATION = Federation("f-1", BASE, "carry", (2, 4), 8, 2.0, "balanced", Training(20, 8, 256))
WORK = Assignment("a-1", 3, 4, carry_rank=8, steps=20, seed=1, expires_in_s=60.0)


def test_the_defaults_take_what_is_usual() -> None:
    limits.require(FEDERATION, Limits())
    limits.require_assignment(WORK, FEDERATION, Limits())
    limits.require_assignment(dataclasses.replace(WORK, steps=1), FEDERATION, Limits())
    assert all(not demand.wrong for demand in limits.demands(FEDERATION, Limits()))


@pytest.mark.parametrize(
    ("allowed", "named"),
    [
        ({"bases": ("org/other",)}, "base: org/model, allowed is org/other"),
        ({"bases": ("abab",)}, "base: org/model"),  # too short for a fingerprint
        (
            {"most_tokens": 20 * 8 * 256 - 1},
            "20 steps × 8 examples × 256 tokens = 40960",
        ),
        ({"most_download_bytes": 1000}, "bytes of a download: "),
        (
            {"least_examples": 161},
            "an update: 20 steps × 8 examples = 160, allowed is at least 161",
        ),
    ],
)
def test_a_federation_beyond_a_limit_is_refused_in_one_line(allowed: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match="is beyond this device's limits") as caught:
        limits.require(FEDERATION, Limits(**allowed))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    exact = {"bases": ("org/model", "x"), "most_tokens": 40960, "least_examples": 160}
    exact["most_download_bytes"] = limits.download_bytes(FEDERATION)
    limits.require(FEDERATION, Limits(**exact))  # type: ignore[arg-type]
    limits.require(FEDERATION, Limits(bases=("ab" * 6,)))


@pytest.mark.parametrize(
    "lie", [{"steps": 21}, {"steps": 2**31 - 1}, {"steps": 2}, {"rank": 5}, {"carry_rank": 9}]
)
def test_work_that_the_federation_does_not_give_is_refused(lie: dict[str, int]) -> None:
    with pytest.raises(Unreachable, match="is refused"):
        limits.require_assignment(dataclasses.replace(WORK, **lie), FEDERATION, Limits(least_examples=24))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["most_tokens", "most_download_bytes", "least_examples"])
def test_a_limit_that_nothing_meets(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} 0 must be 1 or more"):
        Limits(**{name: 0})  # type: ignore[arg-type]


def test_limits_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "device.toml"
    path.write_text('[limits]\nbases = ["tiny"]\nmost_download = "5MB"\nleast_examples = 16\n')
    assert load_device_config(path).options().limits == Limits(("tiny",), 100_000_000, 5_000_000, 16)
    path.write_text("[limits]\nmost_download = 5\n")
    with pytest.raises(InputError, match="limits.most_download: expected str, got int"):
        load_device_config(path)
