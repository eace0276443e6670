"""The wheel, built and installed from nothing under each Python: results/wheels.json.

Each gets an environment of its own in a temporary folder, the tested versions of what the wheel
needs, and from an empty folder the commands that a user starts with. Wants `make trial`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments import CHECKOUT
from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.files import write_text
from gemoe_ds.parser import Parser

PYTHONS = ("python3.11", "python3.12", "python3.13")
TRIAL = CHECKOUT / "runs/trial"
_PACKAGES = ("torch", "transformers", "deepspeed")
_VERSIONS = (
    "import platform; from importlib.metadata import version; "
    f"print(platform.python_version(), *map(version, {_PACKAGES!r}))"
)


@dataclass(frozen=True)
class Tried:
    """What happened under one Python."""

    python: str
    packages: dict[str, str]
    install_s: float
    commands: list[str]  # each ended with exit code 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m experiments.wheels", description=__doc__)
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, metavar="PYTHON")
    parser.add_argument("--out", type=Path, default=Path("results/wheels.json"))
    arguments = parser.parse_or_exit(argv)
    os.chdir(CHECKOUT)
    with exit_on_error(), tempfile.TemporaryDirectory() as folder:
        begun = provenance()
        if not TRIAL.exists():
            raise ConfigError("runs/trial is not there: run make trial first")
        wheel = build(Path(folder))
        rows = [asdict(try_out(python, wheel)) for python in present(arguments.pythons)]
        report = {"wheel": wheel.name, "rows": rows, **begun}
        write_text(arguments.out, json.dumps(report, indent=1) + "\n")
        print(f"saved {arguments.out}")
    return 0


def present(pythons: Sequence[str]) -> list[str]:
    """Those that can make environments; the others are named. ConfigError if none can."""
    found = []
    for python in pythons:
        command = [python, "-c", "import venv, ensurepip"]
        if shutil.which(python) and not subprocess.run(command, capture_output=True).returncode:
            found.append(python)
        else:
            print(f"== {python} is left out: it is not here, or cannot make environments")
    if not found:
        raise ConfigError(f"none of {', '.join(pythons)} is here")
    return found


def build(folder: Path) -> Path:
    """The wheel of the checkout's last commit."""
    source = folder / "source"
    source.mkdir()
    files = subprocess.run(["git", "archive", "HEAD"], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=source, input=files, check=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(folder), str(source)]
    _run(pip, folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def try_out(python: str, wheel: Path) -> Tried:
    """Install the wheel into a new environment and use it from an empty folder.

    Raises ConfigError with the output of the first command that fails.
    """
    folder = Path(tempfile.mkdtemp(dir=wheel.parent))
    bin_, empty = folder / "environment/bin", folder / "empty"
    empty.mkdir()
    _run([python, "-m", "venv", str(bin_.parent)], folder)
    started = time.monotonic()
    pins = ["-c", str(CHECKOUT / "constraints.txt")]
    _run([str(bin_ / "pip"), "install", *pins, str(wheel)], folder)
    seconds = time.monotonic() - started
    (empty / "readme.py").write_text(readme_example())
    shutil.copy(CHECKOUT / "launch/recipes/trial.yaml", empty)
    commands = _commands()
    for command in commands:
        program, *words = command.replace("TRIAL", str(TRIAL)).split()
        _run([str(bin_ / program), *words], empty)
    told = _run([str(bin_ / "python"), "-c", _VERSIONS], folder).split()
    shutil.rmtree(folder)
    print(f"{told[0]}: installed in {seconds:.0f} s, {len(commands)} commands ended well")
    packages = dict(zip(_PACKAGES, told[1:], strict=True))
    return Tried(told[0], packages, round(seconds, 1), commands)


def _commands() -> list[str]:
    """TRIAL stands for runs/trial of the checkout."""
    run = "runs/trial/run/config.yaml --trained runs/trial/run"
    return [
        "gemoe --version",
        "python readme.py",
        "gemoe train olmoe_gemoe_8_gpus --help",
        "gemoe train trial.yaml data.train_path=TRIAL/data/train data.tokenizer=TRIAL/tokenizer "
        "model.checkpoint=TRIAL/pretrain/hf parallel.ep_size=1 deepspeed=zero2 train.steps=4 "
        "optim.warmup_steps=2",
        f"gemoe evaluate {run} --data TRIAL/data/test --out evaluated",
        f"gemoe export {run} --out exported",
    ]


def readme_example() -> str:
    """The first Python of the front page."""
    page = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    return found[1]


def _run(command: list[str], folder: Path) -> str:
    """Its standard output; this process's own Python stays out of it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stdout + done.stderr)[-3000:]
        raise ConfigError(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
