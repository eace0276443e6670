"""One number for the state of the source: what can change a result, results and prose aside."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

_ASIDE = ("results/", "docs/", "experiments/release/", "experiments/grids/contest_trials.json")


def source_hash(root: Path) -> str:
    """12 hex digits over names and contents of git's files as they lie in the working copy."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True
    ).stdout
    total = hashlib.sha256()
    for name in sorted(filter(None, listed.split("\0"))):
        path = root / name
        if name.startswith(_ASIDE) or name.endswith(".md") or not path.is_file():
            continue
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{name}\0{content}\0".encode())
    return total.hexdigest()[:12]
