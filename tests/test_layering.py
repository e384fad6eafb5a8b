"""The house: which wings there are, which of them stands on which, and what may be imported where.

What a newcomer must know stands in the table at the top. A file that belongs to no wing fails the first
test; a new wing gets its place on a floor.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Floors from the ground up: a wing imports itself and those on the floors below its own, nothing else.
HOUSE: dict[str, tuple[tuple[str, ...], ...]] = {
    "edge_sdk": (
        ("core",),
        ("conditions", "system", "text"),
        ("machine", "connection", "options"),
        ("model", "callbacks"),
        ("training", "membership"),
        ("trials", "worker"),
        ("participation",),
        ("agent", "diagnosis"),
        ("commands",),
        ("cli",),
    ),
    "edge_sdk.core": (
        ("version", "words"),
        ("errors", "ranges"),
        ("records", "lora", "addresses"),
        ("toml_file", "adapter_file", "svd", "invitation"),
        ("profile", "flexlora"),
        ("messages",),
        ("routes", "choice"),
    ),
    "coordinator": (
        ("engine", "storage", "rules", "listening", "limits"),  # these know nothing of each other
        ("privacy",),
        ("merging",),
        ("adapters", "settings"),
        ("upkeep",),
        ("service",),
        ("web",),
        ("commands",),
        ("cli",),
    ),
}
# Where torch lives, and all that is built on it. Nothing else imports it.
TORCH = ("edge_sdk.model", "edge_sdk.training", "edge_sdk.trials", "edge_sdk.worker.worker")
TORCH += ("edge_sdk.machine.torch_device", "coordinator.merging.torch_svd")

# Besides the core, what the coordinator shares with devices. These need Python alone.
SHARED = ("edge_sdk.system.durable", "edge_sdk.system.heap", "edge_sdk.system.terminal")

LEARNING = {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}
OF_THE_DEVICE = LEARNING | {"httpx"}
HEAVY = OF_THE_DEVICE | {"psutil", "aiohttp"}
# Their own file names what an application imports, and loads it when it is asked for.
FACES = ("edge_sdk", "coordinator")


# --- the tree, as files have it -------------------------------------------------------------------


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in python_files("edge_sdk", "coordinator")}


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it: `from x import y` gives `x.y`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_named(path: Path) -> set[str]:
    """Modules of this project that a file imports, or imports something from."""
    found = {name if name in MODULES else name.rpartition(".")[0] for name in imports_of(path)}
    return {name for name in found if name in MODULES} - {module_of(path)}


GRAPH = {module: modules_named(path) for module, path in MODULES.items()}


def place_in(package: str, module: str) -> str | None:
    """The part of `package` that a module belongs to; None where it is the package itself or outside."""
    inside = module.removeprefix(f"{package}.")
    return inside.split(".")[0] if inside != module else None


def below(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def of_core(module: str) -> bool:
    return below(module, "edge_sdk.core")


def for_both(module: str) -> bool:
    return of_core(module) or below(module, *SHARED)


# --- wings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", HOUSE)
def test_every_file_belongs_to_a_wing(package: str) -> None:
    places = {place_in(package, module) for module in MODULES} - {None}
    assert places == {wing for floor in HOUSE[package] for wing in floor}


@pytest.mark.parametrize("package", HOUSE)
def test_a_wing_imports_from_the_floors_below_its_own_alone(package: str) -> None:
    floor_of = {wing: number for number, floor in enumerate(HOUSE[package]) for wing in floor}
    elsewhere = []
    for module, named in GRAPH.items():
        here = place_in(package, module)
        for other in sorted(named):
            there = place_in(package, other)
            if here is None or there is None or here == there:
                continue
            if floor_of[there] >= floor_of[here]:
                elsewhere.append(f"{module} imports {other}")
    assert elsewhere == []


def test_the_ground_floor_of_the_coordinator_knows_nothing_of_each_other() -> None:
    assert {"engine", "storage", "rules"} <= set(HOUSE["coordinator"][0])
    for wing in HOUSE["coordinator"][0]:
        own = f"coordinator.{wing}"
        named = {other for module in GRAPH if below(module, own) for other in GRAPH[module]}
        assert named, f"{own} imports nothing: is it still there?"
        assert [other for other in named if not for_both(other) and not below(other, own)] == []


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others: what is left when all others are taken away."""
    left = {module: set(named) for module, named in graph.items()}
    while True:
        named = set().union(*left.values()) if left else set()
        gone = {module for module, others in left.items() if not others or module not in named}
        if not gone:
            return sorted(left)
        left = {module: others - gone for module, others in left.items() if module not in gone}


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(GRAPH) == []


def wing_faces() -> list[Path]:
    faces = python_files("edge_sdk", "coordinator")
    return [path for path in faces if path.name == "__init__.py" and module_of(path) not in FACES]


@pytest.mark.parametrize("path", wing_faces(), ids=shown)
def test_a_wing_says_what_it_is_and_loads_nothing(path: Path) -> None:
    """Otherwise importing one light file of it would load all the others, and torch with them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert len(tree.body) == 1
    assert ast.get_docstring(tree)


# --- torch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", python_files("edge_sdk", "coordinator"), ids=shown)
def test_learning_libraries_are_named_in_their_wings_alone(path: Path) -> None:
    named = {name.split(".")[0] for name in imports_of(path)} & LEARNING
    assert not named or below(module_of(path), *TORCH)


SOME = {
    "edge_sdk/machine/torch_device.py": {"torch"},
    "edge_sdk/worker/worker.py": {"torch"},
    "edge_sdk/training/checkpoint.py": set[str](),
    "edge_sdk/training/plan.py": set[str](),
    "edge_sdk/training/fair_lock.py": set[str](),
    "edge_sdk/training/factor_layers.py": {"torch", "bitsandbytes"},
    "edge_sdk/training/loss.py": {"torch"},
    "edge_sdk/training/optimizers.py": {"torch", "bitsandbytes"},
    "edge_sdk/training/recompute.py": {"torch", "transformers"},
    "edge_sdk/model/files.py": set[str](),
    "edge_sdk/model/four_bit_layers.py": set[str](),  # the trial must not wait for transformers
    "edge_sdk/trials/four_bit.py": {"torch"},
    "edge_sdk/trials/four_bit_child.py": {"torch", "bitsandbytes"},  # nor for what it imports
    "edge_sdk/trials/library_memory.py": set[str](),
    "edge_sdk/trials/library_memory_child.py": {"torch"},
    "edge_sdk/trials/step_times.py": set[str](),
    "edge_sdk/trials/step_times_child.py": {"torch"},
    "edge_sdk/trials/findings.py": set[str](),
    "coordinator/merging/torch_svd.py": {"torch"},  # where the host asks for an accelerator
}


@pytest.mark.parametrize("name", SOME)
def test_these_files_need_some_of_them_only(name: str) -> None:
    named = {found.split(".")[0] for found in imports_of(ROOT / name)} & LEARNING
    assert named <= SOME[name]


# --- what an import loads -------------------------------------------------------------------------


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


def test_the_probe_sees_what_is_loaded() -> None:
    assert "torch" in loaded_by("torch")


def test_importing_edge_sdk_loads_nothing() -> None:
    assert not loaded_by("edge_sdk") & (HEAVY | {"numpy", "safetensors", "rich", "tqdm", "coordinator"})


@pytest.mark.parametrize("module", ["edge_sdk.cli", "edge_sdk.diagnosis.doctor"])
def test_the_doctor_starts_without_the_libraries_that_it_may_find_missing(module: str) -> None:
    assert not loaded_by(module) & HEAVY


def test_the_core_needs_numpy_safetensors_and_msgspec_only() -> None:
    modules = [module for module in MODULES if of_core(module)]
    assert "edge_sdk.core.flexlora" in modules
    assert "edge_sdk.core.svd.decompose" in modules
    loaded = loaded_by(*modules)
    assert not loaded & (HEAVY | {"rich", "tqdm"})
    assert [m for m in loaded if m.startswith("edge_sdk.") and not of_core(m)] == []
    packages = {name.split(".")[0] for name in loaded - loaded_by("json")} - sys.stdlib_module_names
    # msgspec makes use of typing_extensions where it is installed.
    assert packages - {"edge_sdk", "typing_extensions"} == {"numpy", "safetensors", "msgspec"}


@pytest.mark.parametrize("module", SHARED)
def test_what_is_shared_needs_python_alone(module: str) -> None:
    loaded = loaded_by(module)
    assert not loaded & (HEAVY | {"numpy", "rich", "tqdm"})


@pytest.mark.parametrize("module", [m for m in MODULES if below(m, "coordinator")])
def test_the_coordinator_loads_no_learning_library(module: str) -> None:
    loaded = loaded_by(module)
    assert not loaded & (OF_THE_DEVICE | {"psutil"})
    assert [m for m in loaded if m.startswith("edge_sdk.") and not for_both(m)] in ([], ["edge_sdk.system"])


@pytest.mark.parametrize("module", [m for m in MODULES if below(m, "edge_sdk") and not of_core(m)])
def test_the_device_loads_nothing_of_the_coordinator(module: str) -> None:
    loaded = loaded_by(module)
    assert not loaded & {"coordinator", "aiohttp"}
    if not below(module, *TORCH):
        assert not loaded & LEARNING


def test_an_application_that_trains_in_a_process_of_its_own_holds_no_learning_library() -> None:
    modules = (
        "edge_sdk.worker.process",
        "edge_sdk.worker.messages",
        "edge_sdk.participation.corrections",
    )
    assert not loaded_by(*modules) & OF_THE_DEVICE


# --- what a file names ----------------------------------------------------------------------------


def literals_of(path: Path) -> Iterator[str]:
    """String constants of a file but for docstrings, which may name a route to explain it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


@pytest.mark.parametrize("path", python_files("edge_sdk"), ids=shown)
def test_edge_sdk_never_names_the_coordinator(path: Path) -> None:
    assert [name for name in imports_of(path) if name.split(".")[0] == "coordinator"] == []


@pytest.mark.parametrize("path", python_files("coordinator"), ids=shown)
def test_the_coordinator_names_only_the_core_and_what_is_shared(path: Path) -> None:
    named = [name for name in imports_of(path) if name.split(".")[0] == "edge_sdk"]
    assert [name for name in named if not for_both(name)] == []


@pytest.mark.parametrize("path", python_files("edge_sdk", "coordinator"), ids=shown)
def test_routes_are_named_in_messages_alone(path: Path) -> None:
    if shown(path) != "edge_sdk/core/messages.py":
        assert [text for text in literals_of(path) if "/v1/" in text] == []
