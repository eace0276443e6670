"""Who imports whom, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator, Mapping
from pathlib import Path


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import, in functions too, and of import_module("...").

    `from a import b` gives `a.b`: b may be a module. `package` resolves relative imports.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
            first = node.args[0]
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def at_once(module: str, path: Path, *, checked: bool = True) -> set[str]:
    """What a file imports when it is imported; `checked`: under TYPE_CHECKING, too."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        only_checked = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if late or (only_checked and not checked):
            node.body = []
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    return {name for _, name in imported(tree, package)}


def files_of(root: Path, *folders: str) -> dict[str, Path]:
    """By dotted name."""
    paths = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    return {module_of(path.relative_to(root)): path for path in paths}


def owner(name: str, modules: Container[str]) -> str:
    """Of a dotted name: itself, if it is a module, or what it is taken from."""
    return name if name in modules else name.rpartition(".")[0]


def module_of(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def reachable(start: str, imports: Mapping[str, set[str]]) -> set[str]:
    """What `start` imports, directly or not; itself only if it is in a circle."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = imports[waiting.pop()] - found
        found |= new
        waiting += new
    return found
