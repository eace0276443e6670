"""How a program ends: one line and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.config.minimal import MINIMAL
from tests.helpers import repository


def test_a_bad_recipe_ends_a_program_with_one_line_and_code_2(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MINIMAL)
    program = (
        "import sys\n"
        "from gemoe_ds.config import parse_cli\n"
        "from gemoe_ds.errors import exit_on_error\n"
        "with exit_on_error():\n"
        "    parse_cli(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(recipe), "optim.lr=0"],
        cwd=repository(),
        env=os.environ | {"PYTHONPATH": str(repository())},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: optim.lr=0: should be greater than 0\n"
