"""Code that comes with a base model never runs, and nobody is asked on the terminal whether it may."""

from __future__ import annotations

import ast
from pathlib import Path

import edge_sdk

LOADERS = {"from_pretrained", "from_config"}


def test_every_call_that_loads_by_transformers_says_no_to_remote_code() -> None:
    """Left open, transformers asks on the terminal, and runs the code on `y`."""
    seen = 0
    for path in Path(edge_sdk.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LOADERS
            ):
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert said.get("trust_remote_code") in ("False", "trust_remote_code"), (
                    f"{path}:{node.lineno}"
                )
                seen += 1
    assert seen >= 5
