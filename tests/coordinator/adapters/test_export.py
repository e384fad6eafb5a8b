"""The exported folder: no loader meets one adapter with another's configuration, whatever breaks it off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from coordinator.adapters.serving import export
from edge_sdk.core.errors import InputError
from tests.coordinator.adapters.test_ladder import FEDERATION


def ranks(out: Path) -> tuple[int, int]:
    """The rank that the configuration says, and that of the adapter."""
    said = json.loads((out / "adapter_config.json").read_text())["r"]
    tensors = load_file(out / "adapter_model.safetensors")
    return said, max(min(tensor.shape) for tensor in tensors.values())


def test_a_second_export_takes_the_place_of_the_first(tmp_path: Path) -> None:
    for rank in (2, 4):
        export(FEDERATION, 0, None, rank, tmp_path / "out")
        assert ranks(tmp_path / "out") == (rank, rank)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("nth", [1, 2])
def test_an_export_that_breaks_off_tears_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """The disk fails at each rename in turn: of the adapter, then of the configuration."""
    out = tmp_path / "out"
    export(FEDERATION, 0, None, 2, out)
    replace, count = Path.replace, 0

    def fails(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == nth:
            raise OSError(5, "Input/output error")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(InputError, match=r"out: the adapter cannot be written \(Input/output error\)"):
        export(FEDERATION, 0, None, 4, out)
    assert not (out / "adapter_config.json").exists()
    monkeypatch.undo()
    export(FEDERATION, 0, None, 4, out)
    assert ranks(out) == (4, 4)


def test_a_full_disk_leaves_the_adapter_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(FEDERATION, 0, None, 2, out)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        export(FEDERATION, 0, None, 4, out)
    assert ranks(out) == (2, 2)


def test_a_file_in_the_folder_s_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="out: the adapter cannot be written"):
        export(FEDERATION, 0, None, 2, tmp_path / "out")
