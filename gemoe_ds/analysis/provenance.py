"""Where a number comes from: the command, commit, machine and date of this process."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """command, commit, machine and date of this process, as `EvalRecord` wants them."""
    return {
        "command": shlex.join([*_program(), *sys.argv[1:]]),
        "commit": commit_of(Path(__file__).resolve().parents[2]),
        "machine": _machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def named_from_here(path: Path | str | None) -> str:
    """A path within the working directory as it is called from there; any other as it is."""
    given = Path(str(path))
    here = Path.cwd()
    return str(given.relative_to(here) if given.is_relative_to(here) else given)


def _program() -> list[str]:
    """`gemoe COMMAND`, or Python and what it runs: a script, or a module with -m."""
    if sys.argv[0].startswith("gemoe "):
        return sys.argv[0].split()
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    run = ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return [Path(sys.executable).name, *run]


def commit_of(root: Path) -> str | None:
    """40 digits, of a checkout; `-dirty` where tracked files were changed, but for those in
    results/, which runs write."""
    if not (root / ".git").exists():
        return None

    def said(*command: str) -> str:
        done = subprocess.run(
            ["git", *command], cwd=root, capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    try:
        commit = said("rev-parse", "HEAD")
        changed = said("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _machine() -> str:
    """Processor, cores, and GPUs if torch is loaded and sees some."""
    name = os.uname().machine
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{cores} x {name}"]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(parts)
