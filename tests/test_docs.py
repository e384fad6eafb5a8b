"""The documents name only what is there: files, modules and what stands in them, links and headings."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("edge_sdk", "coordinator", "benchmarks", "examples", "profiles", "tests")
SKIPPED = {"CHANGELOG.md"}  # speaks of what was there at its time
DESIGN_LINES = 200


def files() -> list[str]:
    found = [*ROOT.glob("*"), *(path for name in (*PACKAGES, "docs") for path in (ROOT / name).rglob("*"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in found if path.is_file())


FILES = files()
MARKDOWN = [ROOT / name for name in FILES if name.endswith(".md") and name not in SKIPPED]
assert len(MARKDOWN) > 10


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- files ----------------------------------------------------------------------------------------

ANY = "|".join(PACKAGES)
FILE = re.compile(rf"(?<![\w./:*-])((?:[\w-]+/)*[\w-]+\.py|(?:{ANY}|docs)/(?:[\w.-]+/?)*)")
"""A Python file, by its path or by the end of it; or any path from the root."""


def named_files(text: str) -> Iterator[str]:
    for found in FILE.findall(text):
        yield found.rstrip(".")


def places_of(name: str, document: Path) -> list[str]:
    """Paths that a name can mean: from the root, from the document's own folder, or the end of one path."""
    if (ROOT / name).exists() or (document.parent / name).exists():
        return [name]
    return [path for path in FILES if path.endswith(f"/{name}")]


@pytest.mark.parametrize("document", MARKDOWN, ids=shown)
def test_every_file_that_is_named_is_there_and_is_one(document: Path) -> None:
    names = set(named_files(document.read_text(encoding="utf-8"))) - {"__init__.py"}
    unclear = {name: places_of(name, document) for name in names}
    assert {name: found for name, found in unclear.items() if len(found) != 1} == {}


def test_names_of_files_are_found_in_text() -> None:
    text = "see `coordinator/rules/carry.py`, parallel.py and (docs/WIRE.md); not http://x/y.py or a/*.py"
    assert list(named_files(text)) == ["coordinator/rules/carry.py", "parallel.py", "docs/WIRE.md"]
    assert places_of("rules/carry.py", ROOT / "README.md") == ["coordinator/rules/carry.py"]
    assert places_of("rules/nothing.py", ROOT / "README.md") == []


# --- modules, and what stands in them -------------------------------------------------------------

DOTTED = re.compile(rf"(?<![\w./-])((?:{ANY})(?:\.\w+)+)")
NOT_MODULES = (".py", ".md", ".toml", ".json", ".sqlite.schema")


@functools.cache
def defined_in(path: Path) -> set[str]:
    """Names at the top of a module; of its classes also `Class.name`."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names |= _defined(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for inner in node.body for name in _defined(inner)}
    return names


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def is_there(dotted: str) -> bool:
    """Whether a dotted name is a module, a package, or something that a module defines."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        place, rest = ROOT.joinpath(*parts[:length]), ".".join(parts[length:])
        if place.is_dir() and not rest:
            return True
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.exists():
                return not rest or rest in defined_in(file)
    return False


@pytest.mark.parametrize("document", MARKDOWN, ids=shown)
def test_every_module_that_is_named_is_there_with_what_is_named_of_it(document: Path) -> None:
    names = set(DOTTED.findall(document.read_text(encoding="utf-8")))
    modules = [name for name in sorted(names) if not name.endswith(NOT_MODULES)]
    assert [name for name in modules if not is_there(name)] == []


def test_dotted_names_are_looked_up() -> None:
    assert is_there("edge_sdk.core.choice.carried.splits")
    assert is_there("coordinator.storage.blobs.Blobs.write")
    assert is_there("coordinator.engine.diagram")
    assert not is_there("coordinator.engine.nothing")
    assert not is_there("edge_sdk.core.lora.Nothing")


# --- links ----------------------------------------------------------------------------------------

LINK = re.compile(r"\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def anchors_of(document: Path) -> set[str]:
    """As GitHub makes them of headings: small letters, no punctuation, hyphens for spaces."""
    text = document.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in HEADING.findall(text)}


@pytest.mark.parametrize("document", MARKDOWN, ids=shown)
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name) if name else document
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page: `code`, and more\n```\n# no heading\n```\n## What's new?\n", encoding="utf-8")
    assert anchors_of(page) == {"a-page-code-and-more", "whats-new"}


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        if document in seen:
            continue
        seen.add(document)
        for link in LINK.findall(document.read_text(encoding="utf-8")):
            target = (document.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.exists():
                waiting.append(target)
    assert [shown(path) for path in MARKDOWN if path not in seen] == []


# --- the other way round: documents that code names ------------------------------------------------


def test_every_document_that_code_names_is_there() -> None:
    missing = []
    for name in FILES:
        if name.endswith((".py", ".toml")) and (ROOT / name).exists():
            text = (ROOT / name).read_text(encoding="utf-8")
            found = set(re.findall(r"\bdocs/[\w-]+\.\w+", text)) - {"docs/test"}
            missing += [f"{name}: {page}" for page in sorted(found) if not (ROOT / page).exists()]
    assert missing == []


# --- the design -----------------------------------------------------------------------------------


def test_the_design_is_short_and_draws_every_wing() -> None:
    text = (ROOT / "docs" / "DESIGN.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= DESIGN_LINES
    drawing = next(block for block in text.split("```") if "edge_sdk.core" in block and "┌" in block)
    faces = [*ROOT.glob("edge_sdk/*/__init__.py"), *ROOT.glob("coordinator/*/__init__.py")]
    wings = {path.parent.name for path in faces}
    assert {wing for wing in wings if not re.search(rf"\b{wing}\b", drawing)} == set()
