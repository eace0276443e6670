"""Imports run one way between the rooms of the project, and heavy libraries stay in theirs."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

from tests.helpers import repository
from tests.imports import at_once, files_of, imported, owner, reachable

PACKAGE = "gemoe_ds"

# A room may import itself and the rooms above it, no other. So analysis/ reads the files that runs
# leave behind, never models. A file may be a room of its own: scoring a model, and
# holding it to a budget, know nothing of runs, and both training and evaluation do it.
ROOMS = [
    "errors",
    "files",
    "console",
    "parser",
    "registry",
    "analysis",
    "progress",
    "moe",
    "routers",
    "hf_io",
    "models",
    "data",
    "config",
    "export",
    "serving",
    "engine",
    "checkpoint",
    "cluster",
    "evaluation.routing",
    "evaluation.score",
    "evaluation.budget",
    "train",
    "evaluation",
    "cli",
    "__main__",
]

# Libraries that are welcome in some rooms only. Scripts count as rooms by their folder's name.
# data/ and data_prep/ may read and write tokenizer folders, which are transformers' format.
ONLY_IN = {
    "deepspeed": {"engine", "benchmarks"},  # whose layers run beside ours
    "transformers": {"hf_io", "models", "data", "data_prep", "export", "serving", "benchmarks"},
    "vllm": {"serving"},
    "datasets": {"data", "evaluation", "benchmarks"},  # which the loader is timed against
    "lm_eval": {"evaluation", "benchmarks"},  # what answers are timed against
    "lmms_eval": {"evaluation"},
    "grain": {"data"},
    "matplotlib": {"analysis", "benchmarks", "experiments"},
}

# What is no part of the product: measured with it, never imported by it, not in the wheel.
EVIDENCE = ("benchmarks", "experiments")

SCRIPTS = ("launch", "data_prep", *EVIDENCE)


def violations(root: Path) -> list[str]:
    """Every import under `root` that breaks the rules above, as `file:line: reason`."""
    found = []
    for folder in (PACKAGE, *SCRIPTS):
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root)
            room = folder if folder in SCRIPTS else room_of(relative.with_suffix("").parts[1:])
            package = ".".join(relative.parts[:-1])
            for line, name in imported(ast.parse(path.read_text()), package):
                reason = objection(room, name)
                if reason:
                    found.append(f"{relative}:{line}: {reason}")
    return found


def room_of(parts: Sequence[str]) -> str:
    """Of a dotted name in the package, in parts."""
    file = ".".join(parts[:2])
    return file if file in ROOMS else parts[0]


def objection(room: str, name: str) -> str | None:
    """Why `room` must not import `name`; None if it may."""
    top, _, rest = name.partition(".")
    if top in ONLY_IN and room not in ONLY_IN[top]:
        return f"{room} imports {top}, which belongs in {', '.join(sorted(ONLY_IN[top]))}"
    if top in EVIDENCE and room not in EVIDENCE:
        return f"{room} must not import {top}"
    target = room_of(rest.split("."))
    if top != PACKAGE or target not in ROOMS or room in SCRIPTS or room == "__init__":
        return None
    if room not in ROOMS:
        return f"{room} is no room yet; give it a place in ROOMS"
    if ROOMS.index(target) > ROOMS.index(room):
        return f"{room} must not import {target}"
    return None


def circles(root: Path) -> list[list[str]]:
    """Groups of files of the package that import each other, by however long a way.

    Imports inside functions do not count: they run when all is there. Those under TYPE_CHECKING do:
    two files that need each other's types are one idea in two places.
    """
    files = files_of(root, PACKAGE)
    imports = {
        module: {owner(name, files) for name in at_once(module, path)} & files.keys() - {module}
        for module, path in files.items()
    }
    reached = {module: reachable(module, imports) for module in files}
    groups = {frozenset(m for m in reached[module] if module in reached[m]) for module in files}
    return sorted(sorted(group) for group in groups if group)


def test_imports_run_one_way() -> None:
    assert violations(repository()) == []


def test_no_two_files_import_each_other() -> None:
    assert circles(repository()) == []


def test_a_circle_is_found_however_long_and_under_type_checking(tmp_path: Path) -> None:
    files = {
        "__init__": "",
        "a": "from gemoe_ds.b import x",
        "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .c import x",
        "c": "import gemoe_ds.a\nfrom gemoe_ds import d",
        "d": "def f():\n    from gemoe_ds import a",
    }
    (tmp_path / PACKAGE).mkdir()
    for name, source in files.items():
        (tmp_path / PACKAGE / f"{name}.py").write_text(source)
    assert circles(tmp_path) == [["gemoe_ds.a", "gemoe_ds.b", "gemoe_ds.c"]]


def test_every_part_of_the_package_is_a_room() -> None:
    parts = {
        path.stem
        for path in (repository() / PACKAGE).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts - {"__init__"} <= set(ROOMS)


def test_the_wheel_holds_the_product_alone() -> None:
    project = tomllib.loads((repository() / "pyproject.toml").read_text(encoding="utf-8"))
    search = project["tool"]["setuptools"]["packages"]["find"]
    found = {
        name.partition(".")[0] for name in find_namespace_packages(str(repository()), **search)
    }
    assert found == {PACKAGE}


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("gemoe_ds/moe/a.py", "import deepspeed", "moe imports deepspeed"),
        ("gemoe_ds/moe/a.py", "from transformers import X", "moe imports transformers"),
        ("gemoe_ds/moe/a.py", "def f():\n    import deepspeed.comm", "a.py:2: moe imports"),
        ("gemoe_ds/moe/a.py", "import gemoe_ds.routers.top_k", "moe must not import routers"),
        ("gemoe_ds/moe/a.py", "from gemoe_ds import engine", "moe must not import engine"),
        ("gemoe_ds/moe/a.py", "from ..config import X", "moe must not import config"),
        ("gemoe_ds/moe/a.py", "from .. import data", "moe must not import data"),
        ("gemoe_ds/moe/b/a.py", "from ...train import X", "moe must not import train"),
        ("gemoe_ds/registry.py", "from gemoe_ds.moe import x", "registry must not import moe"),
        (
            "gemoe_ds/train/a.py",
            "import importlib\nimportlib.import_module('deepspeed')",
            "train imports deepspeed",
        ),
        (
            "gemoe_ds/train/a.py",
            "from gemoe_ds.evaluation.session import x",
            "train must not import evaluation",
        ),
        (
            "gemoe_ds/evaluation/score.py",
            "from gemoe_ds.train import x",
            "evaluation.score must not import train",
        ),
        ("gemoe_ds/analysis/a.py", "import gemoe_ds.moe", "analysis must not import moe"),
        ("gemoe_ds/new/a.py", "import gemoe_ds.moe", "new is no room yet"),
        ("launch/a.py", "import deepspeed", "launch imports deepspeed"),
        ("gemoe_ds/analysis/a.py", "import benchmarks", "analysis must not import benchmarks"),
        ("launch/a.py", "from experiments import demo", "launch must not import experiments"),
    ],
)
def test_the_checker_catches_a_planted_violation(
    tmp_path: Path, file: str, source: str, expected: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = violations(tmp_path)
    assert expected in found


def test_the_checker_lets_the_allowed_pass(tmp_path: Path) -> None:
    allowed = {
        "gemoe_ds/engine/a.py": "import deepspeed\nfrom gemoe_ds.moe import x\nfrom . import b",
        "gemoe_ds/train/a.py": "from gemoe_ds.evaluation.score import evaluate",
        "gemoe_ds/data/a.py": "from transformers import AutoTokenizer",
        "gemoe_ds/analysis/a.py": "from gemoe_ds.errors import DataError\nimport matplotlib.pyplot",
        "launch/a.py": "import gemoe_ds.train\nimport gemoe_ds.analysis",
        "benchmarks/a.py": "import deepspeed\nimport gemoe_ds.train\nfrom benchmarks import b",
    }
    for file, source in allowed.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert violations(tmp_path) == []
