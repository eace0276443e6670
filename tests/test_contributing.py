"""The router of CONTRIBUTING.md, as it stands there, registers, routes and keeps the contract."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.helpers import repository


def test_the_example_is_a_router(tmp_path):
    text = (repository() / "CONTRIBUTING.md").read_text(encoding="utf-8")
    router, test = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(router.splitlines()) <= 45, "one screen"
    (tmp_path / "perplexity.py").write_text(router)
    (tmp_path / "test_perplexity.py").write_text(test)
    # as a plugin it is there before the contract's tests are collected
    command = [sys.executable, "-m", "pytest", "-q", "-p", "perplexity", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", str(tmp_path / "test_perplexity.py")]
    command += ["tests/routers/test_contract.py", "-k", "perplexity and not ranks and not moves"]
    path = os.pathsep.join([str(tmp_path), str(repository())])
    done = subprocess.run(
        command,
        cwd=repository(),
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 8


def test_the_example_is_formatted(tmp_path):
    text = (repository() / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)):
        file = tmp_path / f"block_{number}.py"
        file.write_text(block)
        done = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--config", "pyproject.toml", file],
            cwd=repository(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout
