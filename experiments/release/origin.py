"""Where a results file comes from: command, commit, machine and date."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Origin:
    command: str
    commit: str  # of the checkout, `-dirty` where files were changed
    machine: str
    date: str  # of the day


def origin(root: Path, name: str) -> Origin:
    """What results/NAME says of itself, or files beside it say; else the commit that brought it."""
    path = root / "results" / name
    for file in (path, *sorted(path.parent.glob("*.json"))):
        if file.suffix == ".json" and (file == path or path.parent != root / "results"):
            if found := _said(json.loads(file.read_text(encoding="utf-8"))):
                return found
    commit, date = _brought_by(root, path)
    return Origin("", commit, "", date)


def _said(data: Any) -> Origin | None:
    """By the file, or by the first of its parts that names a commit."""
    part = next(_with_commit(data), None)
    if part is None:
        return None
    outer = data if isinstance(data, dict) else {}
    told = {key: str(part.get(key) or outer.get(key) or "") for key in ("command", "machine")}
    return Origin(**told, commit=str(part["commit"]), date=str(part.get("date") or "")[:10])


def _with_commit(data: Any) -> Iterator[dict[str, Any]]:
    if isinstance(data, dict):
        if data.get("commit"):
            yield data
        data = [data.get("made_by"), data.get("meta"), *data.values()]
    if isinstance(data, list):
        for part in data:
            yield from _with_commit(part)


def _brought_by(root: Path, path: Path) -> tuple[str, str]:
    command = ["git", "log", "-1", "--format=%H %cs", "--", str(path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    commit, _, date = done.stdout.strip().partition(" ")
    return commit, date
