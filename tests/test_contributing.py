"""The router of CONTRIBUTING.md, as it stands there, is all that a newcomer adds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers import repository

# Beside the contract: what looks at all routers, or at all files. Of each what is quick.
ALSO = {
    "tests/experiments/compare/test_grid.py": "test_grid",
    "tests/test_rooms.py": "test_rooms",
    "tests/config/test_load.py": "test_config and every_router",
}


def test_the_two_files_are_all_it_takes(tmp_path):
    """Both in a copy of the tree, whose own tests then pass; nothing else is changed there."""
    text = (repository() / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(r"^`([\w/]+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    (router, _), (test, _) = files
    assert len(files[0][1].splitlines()) <= 45, "one screen"
    for folder in ("gemoe_ds", "experiments", "launch", "data_prep", "ds_configs", "tests"):
        shutil.copytree(
            repository() / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(repository() / "pyproject.toml", tmp_path)
    for path, source in files:
        assert not (tmp_path / path).exists()
        (tmp_path / path).write_text(source)
    # training over ranks takes a minute, whatever trains
    own = f"{Path(router).stem} and not ranks and not moves and not checkpoint_is"
    chosen = " or ".join(f"({some})" for some in (own, *ALSO.values()))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        + ["-m", "not slow", "-k", chosen, test, "tests/routers/test_contract.py", *ALSO],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 20
    for check in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *check, *(tmp_path / path for path, _ in files)]
        done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
