"""The check of lengths sees what is one line too long, and lets the longest pass."""

from __future__ import annotations

from pathlib import Path

from tests.lint import FILE, FUNCTION, violations


def test_a_line_too_many_is_a_violation(tmp_path: Path) -> None:
    for folder in ("gemoe_ds/moe", "tests"):
        (tmp_path / folder).mkdir(parents=True)
        for extra in (0, 1):
            method = "class A:\n    async def f(self):\n" + "        1\n" * (FUNCTION - 1 + extra)
            (tmp_path / folder / f"function_{extra}.py").write_text(method)
            (tmp_path / folder / f"file_{extra}.py").write_text("1\n" * (FILE + extra))
    assert list(violations(tmp_path)) == [
        "gemoe_ds/moe/file_1.py: 401 lines, 400 are allowed; there are two jobs in it",
        "gemoe_ds/moe/function_1.py:2: f has 61 lines, not 60",
        "tests/file_1.py: 401 lines, 400 are allowed; there are two jobs in it",
    ]
