"""Imports run downwards only, and importing a light module loads nothing heavy."""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEARNING = {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}
OF_THE_DEVICE = LEARNING | {"httpx"}
HEAVY = OF_THE_DEVICE | {"psutil", "aiohttp"}


def loaded_by(*modules: str) -> set[str]:
    """Names in sys.modules of a fresh interpreter after importing `modules`."""
    program = f"import sys, json\nfor m in {modules!r}: __import__(m)\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def modules_below(package: str) -> list[str]:
    """Every module of a package as the tree has it, without importing any."""
    folder = ROOT / package.replace(".", "/")
    found = [info.name for info in pkgutil.walk_packages([str(folder)], f"{package}.")]
    return sorted(name for name in found if not name.endswith("__main__"))


def of_core(module: str) -> bool:
    return module == "edge_sdk.core" or module.startswith("edge_sdk.core.")


# --- what an import loads -------------------------------------------------------------------------


def test_the_probe_sees_what_is_loaded() -> None:
    assert "torch" in loaded_by("torch")


def test_importing_edge_sdk_loads_nothing() -> None:
    assert not loaded_by("edge_sdk") & (HEAVY | {"numpy", "safetensors", "rich", "tqdm", "coordinator"})


def test_the_core_needs_numpy_and_safetensors_only() -> None:
    modules = modules_below("edge_sdk.core")
    assert "edge_sdk.core.flexlora" in modules
    loaded = loaded_by(*modules)
    assert not loaded & (HEAVY | {"rich", "tqdm"})
    assert [m for m in loaded if m.startswith("edge_sdk.") and not of_core(m)] == []


COORDINATOR = [m for m in modules_below("coordinator") if not m.startswith("coordinator.simulation")]


@pytest.mark.parametrize("module", COORDINATOR)
def test_the_coordinator_loads_no_learning_library(module: str) -> None:
    loaded = loaded_by(module)
    assert not loaded & OF_THE_DEVICE
    assert [m for m in loaded if m.startswith("edge_sdk.") and not of_core(m)] == []


DEVICE = [m for m in modules_below("edge_sdk") if m.count(".") == 1 and m != "edge_sdk.core"]


@pytest.mark.parametrize("module", DEVICE)
def test_the_device_loads_nothing_of_the_coordinator(module: str) -> None:
    assert not loaded_by(module) & {"coordinator", "aiohttp"}


def test_an_application_that_trains_in_a_process_of_its_own_holds_no_learning_library() -> None:
    assert not loaded_by("edge_sdk.worker_process", "edge_sdk.recovery") & OF_THE_DEVICE


# --- what a file says that it imports -------------------------------------------------------------


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it: `from x import y` gives `x.y`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def literals_of(path: Path) -> Iterator[str]:
    """String constants of a file but for docstrings, which may name a route to explain it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", python_files("edge_sdk"), ids=shown)
def test_edge_sdk_never_names_the_coordinator(path: Path) -> None:
    assert [name for name in imports_of(path) if name.split(".")[0] == "coordinator"] == []


@pytest.mark.parametrize("path", python_files("coordinator"), ids=shown)
def test_the_coordinator_names_only_the_core(path: Path) -> None:
    if shown(path).startswith("coordinator/simulation/"):
        pytest.skip("the simulator drives the device's code too")
    named = [name for name in imports_of(path) if name.split(".")[0] == "edge_sdk"]
    assert [name for name in named if not of_core(name) and name != "edge_sdk.__version__"] == []


@pytest.mark.parametrize("path", python_files("edge_sdk", "coordinator"), ids=shown)
def test_learning_libraries_are_named_by_the_trainer_and_its_parts_alone(path: Path) -> None:
    allowed = {
        "edge_sdk/trainer.py": LEARNING,
        "edge_sdk/answering.py": LEARNING,
        "edge_sdk/base_model.py": LEARNING,
        "edge_sdk/adapter_places.py": LEARNING,
        "edge_sdk/cut_down.py": LEARNING,
        "edge_sdk/calibrate.py": {"torch"},
        "edge_sdk/worker.py": {"torch"},
        "edge_sdk/factor_layers.py": {"torch"},
        "edge_sdk/frozen_factors.py": {"torch", "bitsandbytes"},
        "edge_sdk/loss.py": {"torch"},
        "edge_sdk/optimizers.py": {"torch", "bitsandbytes"},
        "edge_sdk/recompute.py": {"torch", "transformers"},
        "edge_sdk/process_memory.py": {"torch"},  # where it is asked of an accelerator
        "edge_sdk/four_bit.py": {"torch", "bitsandbytes"},  # the trial must not wait for transformers
        "edge_sdk/device.py": {"torch"},
        "edge_sdk/preflight.py": {"torch"},
        "coordinator/torch_svd.py": {"torch"},  # where the host asks for an accelerator
    }
    named = {name.split(".")[0] for name in imports_of(path)} & LEARNING
    assert named <= allowed.get(shown(path), set())


@pytest.mark.parametrize(
    "module",
    [
        "edge_sdk.agent",
        "edge_sdk.probe",
        "edge_sdk.preflight",
        "edge_sdk.doctor",
        "edge_sdk.prospect",
        "edge_sdk.cli",
    ],
)
def test_what_an_application_imports_loads_no_learning_library(module: str) -> None:
    assert not loaded_by(module) & LEARNING


@pytest.mark.parametrize("path", python_files("edge_sdk", "coordinator"), ids=shown)
def test_routes_are_named_in_messages_alone(path: Path) -> None:
    if shown(path) != "edge_sdk/core/messages.py":
        assert [text for text in literals_of(path) if "/v1/" in text] == []
