"""The distribution holds the whole tree: packages, data files, commands, the pinned environment."""

from __future__ import annotations

import ast
import importlib.resources
import re
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import coordinator
import edge_sdk

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_of_the_tree_is_listed() -> None:
    found = {"edge_sdk.profiles"}
    for top in ("edge_sdk", "coordinator"):
        found |= {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / top).rglob("__init__.py")}
    assert found == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_profiles_are_found_where_they_are_installed() -> None:
    installed = importlib.resources.files("edge_sdk.profiles")
    names = {entry.name for entry in installed.iterdir() if entry.name.endswith(".toml")}
    assert names == {path.name for path in (ROOT / "profiles").glob("*.toml")}


def test_one_version() -> None:
    assert metadata.version("flexlora-edge") == edge_sdk.__version__ == coordinator.__version__


def test_the_constraints_pin_every_direct_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = PYPROJECT["project"]
    wanted = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[\[<>=]", line)[0] for lines in wanted for line in lines} - {"flexlora-edge"}
    assert names <= set(pins)
    assert not [version for version in pins.values() if "+" in version]


# --- the lock of a coordinator --------------------------------------------------------------------

LOCK = (ROOT / "coordinator-lock.txt").read_text(encoding="utf-8")
LOCKED = dict(re.findall(r"^([\w.-]+)==(\S+) \\$", LOCK, re.MULTILINE))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed_by(requirements: Iterable[str], extra: str = "") -> set[str]:
    """Names of all that these requirements bring along here, theirs and so on."""
    found: set[str] = set()
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = normal(requirement.name)
        if name not in found:
            found |= {name} | needed_by(metadata.requires(name) or ())
    return found


def test_the_lock_holds_all_that_a_coordinator_needs_and_nothing_else() -> None:
    """In the versions that were tested."""
    project = PYPROJECT["project"]
    wanted = needed_by(project["dependencies"] + project["optional-dependencies"]["coordinator"])
    assert {normal(name) for name in LOCKED} == wanted
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {normal(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert {normal(name): pins.get(normal(name)) for name in LOCKED} == {
        normal(name): version for name, version in LOCKED.items()
    }


def test_every_line_of_the_lock_has_a_hash() -> None:
    blocks = re.split(r"^(?=\w)", re.sub(r"^#.*\n", "", LOCK, flags=re.MULTILINE), flags=re.MULTILINE)
    blocks = [block for block in blocks if block.strip()]
    assert len(blocks) == len(LOCKED)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)


# What applications import. A name that goes, or moves behind another, breaks them.
PUBLIC = ["Agent", "BaseMismatch", "Callbacks", "Conditions", "EdgeError", "Event", "InputError", "Limits"]
PUBLIC += ["Options", "OurFault", "OutOfMemory", "TheirFault", "Unauthorised", "Unreachable", "WorkerDied"]
PUBLIC += ["__version__"]


def test_the_public_names_of_the_package() -> None:
    assert sorted(edge_sdk.__all__) == dir(edge_sdk) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_loads(name: str) -> None:
    found = getattr(edge_sdk, name)
    assert name == "__version__" or found.__name__ == name
    assert getattr(edge_sdk, name) is found


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Agnet'"):
        _ = edge_sdk.Agnet


def imported_by(folder: str) -> set[str]:
    """Top-level names that the files of a folder import, anywhere in them."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(
    ("extra", "folder"),
    [
        ("edge", "edge_sdk"),
        ("coordinator", "coordinator"),
        ("privacy", "coordinator"),
        ("examples", "examples"),
        ("benchmarks", "benchmarks"),
    ],
)
def test_an_extra_asks_for_nothing_that_its_package_does_not_import(extra: str, folder: str) -> None:
    wanted = PYPROJECT["project"]["optional-dependencies"][extra]
    names = {re.split(r"[\[<>=]", line)[0].replace("-", "_") for line in wanted}
    assert names - imported_by(folder) == set()
