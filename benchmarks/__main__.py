"""What can be measured: the commands of `benchmarks`, and what each of them shows.

python -m benchmarks                 # this list
python -m benchmarks.rules --help    # what one of them does and takes
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent


def commands() -> dict[str, str]:
    """Name -> the first line of its docstring.

    A command is a file of this folder, or a folder with a `__main__.py`. Nothing is imported: that would load
    torch for a list.
    """
    files = {path.stem: path for path in ROOT.glob("[!_]*.py")}
    files |= {path.parent.name: path for path in ROOT.glob("*/__main__.py")}
    return {name: first_line(files[name]) for name in sorted(files)}


def first_line(path: Path) -> str:
    """Of a module's docstring; empty if it has none."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return doc.splitlines()[0] if doc else ""


def main() -> None:
    """Print the list."""
    for name, says in commands().items():
        print(f"python -m benchmarks.{name}\n    {says}")


if __name__ == "__main__":
    main()
