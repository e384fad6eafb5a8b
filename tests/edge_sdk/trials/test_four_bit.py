"""4-bit training is tried for real, in a process of its own, also where bitsandbytes is broken for real."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from edge_sdk.core.errors import InputError
from edge_sdk.system import child_process
from edge_sdk.trials import four_bit, four_bit_child
from edge_sdk.trials.four_bit import REMEMBERED, four_bit_works
from tests.broken_bitsandbytes import CODE, REASONS, Breakage, write_package


def install(code: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Put a package called bitsandbytes in front of the real one."""
    patch.syspath_prepend(str(write_package(code, folder)))
    patch.delitem(sys.modules, "bitsandbytes", raising=False)


def test_it_works_here_and_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = four_bit_works("cpu", tmp_path / "cache")
    assert (found.ok, found.reason, found.remembered) == (True, "", False)

    def no_child(*arguments: str, timeout_s: float) -> child_process.Outcome:
        raise AssertionError("tried again")

    monkeypatch.setattr(child_process, "run_python", no_child)
    again = four_bit_works("cpu", tmp_path / "cache")
    assert (again.ok, again.seconds, again.remembered) == (True, found.seconds, True)
    (tmp_path / "cache" / REMEMBERED).write_text("{")
    with pytest.raises(AssertionError, match="tried again"):
        four_bit_works("cpu", tmp_path / "cache")


@pytest.mark.parametrize("how", CODE)
def test_a_broken_bitsandbytes_is_reported_and_kills_nothing(
    how: Breakage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(CODE[how], tmp_path / "site", monkeypatch)
    found = four_bit_works("cpu", tmp_path / "cache")
    assert not found.ok
    assert found.reason.startswith(REASONS[how])
    assert "\n" not in found.reason
    assert found.importable == (not how.startswith("import"))
    assert not (tmp_path / "cache").exists()  # what mends it need not change a version: tried again next time


def test_another_installation_is_tried_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = four_bit.installation("cpu")
    assert torch.__version__ in key
    install("", tmp_path, monkeypatch)
    assert four_bit.installation("cpu") != key


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert importlib.util.find_spec("bitsandbytes") is None
    found = four_bit_works("cpu", tmp_path)
    assert (found.ok, found.reason, found.importable) == (False, "bitsandbytes is not installed", False)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(InputError, match="device 'quantum' is not available here"):
        four_bit_works("quantum")


def test_a_folder_that_cannot_be_written_costs_no_more_than_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    lines = (four_bit_child.IMPORTED, '{"wrong": ""}')
    monkeypatch.setattr(child_process, "run_python", lambda *a, timeout_s: child_process.Outcome(lines, ""))
    assert four_bit_works("cpu", tmp_path / "file").ok
    assert "it is found out again next time" in caplog.text


def test_an_application_frozen_into_one_file_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    found = four_bit_works("cpu")
    assert (found.ok, found.importable) == (False, True)
    assert "has no Python interpreter of its own" in found.reason


# --- what the trial notices -------------------------------------------------------------------------


def test_the_trial_finds_nothing_wrong_in_either_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(four_bit_child, "compute_dtype", lambda device, dtype=dtype: dtype)
        assert four_bit_child.trial("cpu") == ""


def test_the_trial_notices_weights_that_do_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    dequantised = four_bit_child.dequantised
    monkeypatch.setattr(four_bit_child, "dequantised", lambda layer: 2 * dequantised(layer))
    assert four_bit_child.trial("cpu") == "weights come back 1.01 away from what was quantised"


class Detached(torch.nn.Module):
    """A layer whose result is right and whose backward does not exist: what repacking for inference does."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.weight = layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x).detach()
        return result


def test_the_trial_notices_a_gradient_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    built = four_bit_child.four_bit_layer

    def first_detached(weight: torch.Tensor, *arguments: object) -> object:
        layer = built(weight, *arguments)  # type: ignore[arg-type]
        return Detached(layer) if weight.shape[1] == four_bit_child.WIDTHS[0] else layer

    monkeypatch.setattr(four_bit_child, "four_bit_layer", first_detached)
    assert four_bit_child.trial("cpu").startswith("the gradient of input is ")


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel:UserWarning")
@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="needs a CPU with AVX512-BF16")
def test_the_trial_is_of_what_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without keep_trainable, bitsandbytes repacks a layer for inference, and the trial must not pass."""
    monkeypatch.setattr(four_bit_child, "keep_trainable", lambda model: None)
    try:
        found = four_bit_child.trial("cpu")
    except RuntimeError as error:
        found = str(error)
    assert found != ""


# --- children ---------------------------------------------------------------------------------------


def test_how_a_child_ended() -> None:
    assert child_process.run_python("-c", "print('a'); print('b')", timeout_s=60) == child_process.Outcome(
        ("a", "b"), ""
    )
    raised = child_process.run_python("-c", "print('a'); raise ValueError('no such thing')", timeout_s=60)
    assert raised == child_process.Outcome(("a",), "ValueError: no such thing")
    assert child_process.run_python("-c", "raise SystemExit(3)", timeout_s=60).failure == "exit code 3"
    slow = child_process.run_python("-c", "print('a', flush=True); import time; time.sleep(60)", timeout_s=1)
    assert slow == child_process.Outcome(("a",), "did not end within 1 s")


def test_crashes_of_windows_are_named() -> None:
    assert child_process.failure_of(0xC000001D, "") == "the process crashed: illegal instruction"


def test_a_child_imports_what_its_parent_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "json.py").write_text("raise SystemExit('the current folder is no library')")
    monkeypatch.chdir(tmp_path / "here")
    code = "import json, sys; print(json.dumps(sys.path))"
    paths = json.loads(child_process.run_python("-c", code, timeout_s=60).lines[0])
    assert [path for path in sys.path if path and path not in paths] == []
