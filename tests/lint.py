"""No function over 60 lines and no file over 400: `python -m tests.lint`, part of `make lint`.

Prints one line a violation; exit code 1 if there is one. For tests only files count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FUNCTION, FILE = 60, 400  # lines, at most
PRODUCT = ("gemoe_ds", "benchmarks", "experiments", "launch", "data_prep", "plugins")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def violations(root: Path) -> Iterator[str]:
    for folder in (*PRODUCT, "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            text, name = path.read_text(encoding="utf-8"), path.relative_to(root)
            if (lines := len(text.splitlines())) > FILE:
                yield f"{name}: {lines} lines, {FILE} are allowed; there are two jobs in it"
            if folder == "tests":
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, _FUNCTIONS) and (lines := length(node)) > FUNCTION:
                    yield f"{name}:{node.lineno}: {node.name} has {lines} lines, not {FUNCTION}"


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From `def` to the last line, docstring included, decorators not."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


if __name__ == "__main__":
    found = list(violations(Path(__file__).resolve().parent.parent))
    print("\n".join(found), end="\n" if found else "")
    sys.exit(bool(found))
