"""A bounded run of every target of the fuzzer, and what longer runs found."""

from __future__ import annotations

import json
import struct

import pytest

from edge_sdk.core.adapter_file.codec import encode
from tests.coordinator.devices import SCALING, random_adapter
from tests.hostile.fuzz import run
from tests.hostile.fuzz_targets import TARGETS, header, problem


@pytest.mark.parametrize("target", TARGETS)
def test_a_bounded_run(target: str) -> None:
    assert run(target, seed=13, runs=1500) == 1500


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_modules_whose_tensors_do_not_belong_together(dtype: str) -> None:
    """Found with seed 13: a file of a coordinator whose header renames one tensor was a KeyError."""
    content = encode(random_adapter(2, 1), SCALING, dtype)  # type: ignore[arg-type]
    length = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + length])
    for name in list(entries):
        renamed = {
            (key.replace(".layers", "..layers") if key == name else key): entries[key] for key in entries
        }
        text = json.dumps(renamed).encode()
        header(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_a_refusal_that_is_nested_too_deeply() -> None:
    """Found with seed 3: it was a RecursionError."""
    problem(b"\x09" + b'{"title":' * 5000)
