"""What `pip install` gives: the wheel is built, unpacked, and run from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers import repository
from tests.wheels import build_wheel, unpacked

# One process, since torch takes seconds to import; each command's exit code and what it says.
COMMANDS = """
import contextlib, io, sys
import gemoe_ds
from gemoe_ds.cli.main import main

def run(line):
    sys.argv, said, code = ["gemoe", *line.split()], io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as left:
            code = left.code
    print(f"\\n== {code} {line}\\n{said.getvalue()}", end="", flush=True)

print(gemoe_ds.__file__)
for line in sys.stdin.read().splitlines():
    run(line)
"""
LIGHT = ["--help", "--version", "trian", "submit --nods 2", "data --help"]
BASE = "parallel.ep_size=1 --dry-run"
HEAVY = [
    f"train olmoe_gemoe_8_gpus {BASE}",
    f"train launch/recipes/olmoe_gemoe_8_gpus.yaml deepspeed=zero3 {BASE}",
    f"train olmoe_gemo_8_gpus {BASE}",
    "train olmoe_gemoe_8_gpus optim.rate=1",
    "data convert --json rows.json --images gone --out data",
    "submit olmoe_gemoe_4_nodes --nodes 4 --dry-run",
    "submit olmoe_gemoe_8_gpus --launcher deepspeed --dry-run",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as `pip wheel` does, from a copy of what is in the repository: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        repository() / "gemoe_ds",
        source / "gemoe_ds",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(repository() / name, source)
    return build_wheel(source, folder)


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    return unpacked(wheel)


def test_it_holds_the_package_and_its_files_alone(wheel, installed):
    names = set(zipfile.ZipFile(wheel).namelist())
    root = repository() / "gemoe_ds"
    for folder, pattern in (("recipes", "*.yaml"), ("ds_configs", "*.json")):
        files = {f"gemoe_ds/{folder}/{path.name}" for path in (root / folder).glob(pattern)}
        assert len(files) > 4 and files <= names
    scripts = {Path(name).name for name in names if name.startswith("gemoe_ds/slurm/")}
    assert scripts == {"train.sbatch", "run.sh", "site.sh"}, "the others want a checkout"
    modules = {f"gemoe_ds/{path.relative_to(root)}" for path in root.rglob("*.py")}
    assert modules <= names and "gemoe_ds/py.typed" in names
    (info,) = installed.glob("*.dist-info")
    assert {name.partition("/")[0] for name in names} == {"gemoe_ds", info.name}
    assert "Apache License" in (info / "licenses/LICENSE").read_text()
    entries = ConfigParser()
    entries.read(info / "entry_points.txt")
    assert dict(entries["console_scripts"]) == {"gemoe": "gemoe_ds.cli.main:main"}
    found = PathDistribution(info)
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert {"torch>=2.13", "deepspeed<0.20,>=0.19.8"} <= set(found.requires or ())


def test_constraints_pin_what_the_project_asks_for():
    root = repository()
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    asked = [Requirement(r) for rs in (project["dependencies"], *extras) for r in rs]
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if line]
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert set(pins) == {requirement.name for requirement in asked}
    assert all(requirement.specifier.contains(pins[requirement.name]) for requirement in asked)


@pytest.fixture(scope="module")
def said(installed) -> dict[str, tuple[int, str]]:
    """Exit code and output of every command, with the wheel's files and no checkout."""
    empty = installed.parent / "empty"
    empty.mkdir()
    own = {"PYTHONPATH": str(installed), "DS_ACCELERATOR": "cpu", "GEMOE_PYTHON": ""}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GEMOE_")}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        cwd=empty,
        env=kept | own,
        input="\n".join(LIGHT + HEAVY),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, *parts = done.stdout.split("\n== ")
    assert first.startswith(str(installed))
    assert not list(empty.iterdir()), "nothing is written"
    results = {}
    for part in parts:
        head, _, text = part.partition("\n")
        code, _, line = head.partition(" ")
        results[line] = int(code), text
    return results


def test_help_and_version(said, installed):
    code, text = said["--help"]
    commands = {p.stem.replace("_", "-") for p in (installed / "gemoe_ds/cli").glob("[!_]*.py")}
    assert code == 0 and all(f"\n  {name} " in text for name in commands - {"main"})
    assert max(map(len, text.splitlines())) <= 100
    assert said["--version"] == (0, f"gemoe {PathDistribution(info(installed)).version}\n")
    assert "\n  convert " in said["data --help"][1]


def info(installed: Path) -> Path:
    return next(installed.glob("*.dist-info"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (LIGHT[2], "'trian': no such command (did you mean train?)"),
        (LIGHT[3], "--nods (did you mean --nodes?)"),
        (HEAVY[0], "model.checkpoint=checkpoints/OLMoE-1B-7B-0924-Instruct: no such file"),
        (HEAVY[1], "model.checkpoint=checkpoints/OLMoE-1B-7B-0924-Instruct: no such file"),
        (HEAVY[2], "ships (did you mean olmoe_gemoe_8_gpus?): deepseek_vl2_gemoe_4_nodes, "),
        (HEAVY[3], "optim.rate: no such option"),
        (HEAVY[4], "--images gone: no such folder"),
    ],
)
def test_a_mistake_is_one_line(said, line, words):
    code, text = said[line]
    assert code == 2
    (error,) = text.splitlines()
    assert error.startswith("error: ") and words in error


def test_submit_starts_the_installed_package(said, installed):
    code, text = said[HEAVY[5]]
    assert code == 0
    assert f"\nsource {installed}/gemoe_ds/slurm/run.sh\n" in text
    assert "\nrun -m gemoe_ds.cli.train olmoe_gemoe_4_nodes --resume auto\n" in text
    assert f'\n[ -n "$GEMOE_PYTHON" ] || GEMOE_PYTHON={sys.executable}\n' in text
    code, text = said[HEAVY[6]]
    assert code == 0 and " --module gemoe_ds.cli.train olmoe_gemoe_8_gpus\n" in text
