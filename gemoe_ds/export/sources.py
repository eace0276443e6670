"""The model code of an exported folder: our own modules, flattened into it.

transformers loads code beside the weights if its imports are relative and in one folder. So
training and the exported model share one implementation of routing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

PACKAGE = "gemoe_ds"
ROOT = Path(__file__).resolve().parents[1]
MODELING = f"{PACKAGE}.export.modeling"
Replaced = Mapping[str, Mapping[str, str]]  # in the source of a module: lines, and what they become


def write_sources(out: Path, roots: Sequence[str], replaced: Replaced, router: str) -> None:
    """modeling_gemoe.py and what it and the other `roots` import, into `out`.

    `router` is the module of the routing method, which registers it.
    """
    for module in closure([MODELING, router, *roots], replaced):
        text = rewritten(source(module, replaced))
        if module == MODELING:
            text += f"\n\nfrom .{flat(router)} import __name__ as _registered  # noqa: E402\n"
        file = "modeling_gemoe.py" if module == MODELING else f"{flat(module)}.py"
        (out / file).write_text(text, encoding="utf-8")


def write_package(out: Path, name: str, modules: list[str]) -> None:
    """These modules and what they import, in folder `out` as a package called `name`.

    The sources as they are, but for the package's name in their imports.
    """
    for module in with_packages(closure(modules)):
        path = _path(module) if _path(module).is_file() else _path(module + ".__init__")
        target = out / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(renamed(path.read_text(encoding="utf-8"), name), encoding="utf-8")


def write_routing(out: Path, name: str) -> None:
    """Every router and what it needs, as a package called `name`: the code that a plugin of a
    server carries."""
    routers = sorted((ROOT / "routers").glob("*.py"))
    write_package(out, name, [f"{PACKAGE}.routers.{path.stem}" for path in routers])
    (out / "__init__.py").write_text('"""The routing code of gemoe_ds, copied."""\n', "utf-8")


def with_packages(modules: list[str]) -> list[str]:
    """The modules and the packages that they are in, without the package itself."""
    parents = {module.rpartition(".")[0] for module in modules} - {PACKAGE}
    return sorted({*modules, *(with_packages(sorted(parents)) if parents else ())})


def renamed(text: str, name: str) -> str:
    """The same source as part of a package called `name`."""
    return re.sub(rf"^(\s*from ){PACKAGE}\b", rf"\1{name}", text, flags=re.MULTILINE)


def source(module: str, replaced: Replaced) -> str:
    text = _path(module).read_text(encoding="utf-8")
    for line, other in replaced.get(module, {}).items():
        assert text.count(line) == 1, f"{module}: {line!r}"
        text = text.replace(line, other)
    return text


def closure(modules: Sequence[str], replaced: Replaced | None = None) -> list[str]:
    """These modules and all of the package that they import, directly or not."""
    found: list[str] = []
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.append(module)
            waiting += imported(source(module, replaced or {}))
    return sorted(found)


def imported(text: str) -> list[str]:
    """The package's modules that a source names in its imports."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append(inner if _path(inner).is_file() else node.module)
    return found


def rewritten(text: str) -> str:
    """The same source with flat relative imports."""

    def of_package(match: re.Match[str]) -> str:
        package, names = match.group(1), match.group(2).split(", ")
        if not all(_path(f"{package}.{name}").is_file() for name in names):
            return match.group(0)
        # The first line is what transformers looks for when it collects files.
        return "\n".join(
            f"from .{flat(inner)} import __name__ as _{name}\nfrom . import {flat(inner)} as {name}"
            for name in names
            for inner in [f"{package}.{name}"]
        )

    text = re.sub(
        rf"^from ({PACKAGE}[\w.]*) import (\w+(?:, \w+)*)$", of_package, text, flags=re.MULTILINE
    )
    return re.sub(
        rf"^from ({PACKAGE}[\w.]+) import",
        lambda match: f"from .{flat(match.group(1))} import",
        text,
        flags=re.MULTILINE,
    )


def flat(module: str) -> str:
    """`gemoe_ds.moe.plan` -> `gemoe_moe_plan`."""
    return "gemoe_" + "_".join(module.split(".")[1:])


def _path(module: str) -> Path:
    return ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
