"""The two harnesses: whether they are there, in the versions that this project is tested with."""

from __future__ import annotations

import io
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from gemoe_ds.errors import ConfigError

REQUIREMENTS = Path(__file__).with_name("eval_requirements.txt")
LM_EVAL, LMMS_EVAL = "lm_eval", "lmms_eval"
INSTALL = (
    f"run `make eval-env`, or `pip install --no-deps -r {REQUIREMENTS}`, which changes nothing of "
    "torch or transformers"
)


def pins() -> dict[str, str]:
    """Package -> version, of eval_requirements.txt."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").split()
    return dict(line.split("==") for line in lines)


def label(harness: str) -> str:
    """As scores.json has it: lm_eval 0.4.13."""
    return f"{harness} {pins()[harness]}"


def check_installed() -> None:
    """ConfigError unless all of the list is there, and the harnesses in these very versions."""
    missing = []
    for package, pinned in sorted(
        pins().items(), key=lambda pin: pin[0] not in (LM_EVAL, LMMS_EVAL)
    ):
        try:
            found = version(package)
        except PackageNotFoundError:
            missing.append(package)
            continue
        if package in (LM_EVAL, LMMS_EVAL) and found != pinned:
            raise ConfigError(
                f"{package} {found} is installed, and `gemoe benchmark` works with {pinned} alone: "
                f"{INSTALL}"
            )
    if missing:
        some = ", ".join(missing[:4]) + (" ..." if len(missing) > 4 else "")
        raise ConfigError(f"`gemoe benchmark` needs {some}, which are not installed: {INSTALL}")


@contextmanager
def quiet_and_seeded() -> Iterator[None]:
    """While tasks are loaded: no bars, and the seeds of lm-eval, which some tasks shuffle with.

    Every task is loaded from the same seeds, in whatever company it is asked for.
    """
    import datasets
    from loguru import logger

    before = random.getstate(), np.random.get_state()
    had_bars = not datasets.are_progress_bars_disabled()
    random.seed(0)
    np.random.seed(1234)
    logger.disable("lmms_eval")
    datasets.disable_progress_bars()
    nowhere = io.StringIO()  # GQA has a bar of its own
    try:
        with redirect_stderr(nowhere):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        if had_bars:
            datasets.enable_progress_bars()


@cache
def _folders_of_files(root: Path) -> dict[str, list[Path]]:
    """Name of a YAML file -> the folders in root that have one."""
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for path in root.glob("**/*.yaml"):
        found[path.stem].append(root / path.relative_to(root).parts[0])
    return found


def folders_with(root: Path, name: str) -> set[Path]:
    """Folders of a harness's tasks that may define this name, so that not all are read.

    That of a file of this name, if there is one such file, or that which the name begins with.
    """
    words = re.split("_", name)
    starts = (root / "_".join(words[:count]) for count in range(len(words), 0, -1))
    folders = {folder for found in _folders_of_files(root).values() for folder in found}
    files = [
        folder for stem in (name, f"_{name}") for folder in _folders_of_files(root).get(stem, [])
    ]
    if len(set(files)) == 1:
        return set(files)
    return {next((folder for folder in starts if folder in folders), root)}
