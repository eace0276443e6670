"""launch/*.py are for launchers, and stand in the way of no package."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.helpers import repository

LAUNCH = repository() / "launch"


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.py")), ids=lambda path: path.name)
def test_its_own_folder_is_not_searched(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python puts a script's folder first, and `evaluate` is a package that lm-eval imports."""
    monkeypatch.setattr(sys, "path", [str(LAUNCH), "", *sys.path])
    tree = ast.parse(path.read_text())
    ours = (
        n for n, node in enumerate(tree.body) if "gemoe_ds" in (getattr(node, "module", "") or "")
    )
    tree.body = tree.body[: next(ours)]
    exec(compile(tree, str(path), "exec"), {"__file__": str(path)})
    assert sys.path[0] == str(repository())
    assert str(LAUNCH) not in sys.path
