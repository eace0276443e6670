"""Which Python files of a folder the export wrote, by checksum: whether they are as it left them,
and whether they are this package's code."""

from __future__ import annotations

import ast
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemoe_ds import __version__
from gemoe_ds.errors import CheckpointError
from gemoe_ds.export.sources import PACKAGE, write_sources
from gemoe_ds.files import sha256_of

PROVENANCE = "provenance.json"
KEY = "code sha256"  # in it: {name of a file: SHA-256 of its content}
MADE_FROM = "code made from"  # what `write_sources` was given; null: no code was written
# The lines that an export puts in place of others: imports of the model's own classes, a setting.
_MODULE = rf"{PACKAGE}(?:\.[a-z_0-9]+)+"
_LINE = re.compile(
    rf"from (?:transformers|{_MODULE}) import \w+ as (?:Stock|Described|KEYS|Model|Layout)"
    rf"|from {_MODULE} import KEYS|gives_rows = (?:True|False)"
)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every Python file of a folder, by name."""
    return {path.name: sha256_of(path) for path in sorted(folder.glob("*.py"))}


def check_code(folder: Path, trusted: bool = False) -> None:
    """Raise CheckpointError unless all code that `trust_remote_code` would run is of the export.

    That is what some `auto_map` of the folder names, and what those files import, directly or not.
    Code of the base that lies beside it is never run, so nothing is said of it.

    The list of checksums is in the folder itself: it shows what has changed since, not who wrote
    it. So the code is also compared with what this package writes; unless `trusted`, other code is
    refused, of another version for example.
    """
    made = _read(folder)
    listed: dict[str, str] = made[KEY]
    for name, expected in listed.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is gone, which the export wrote; export again")
        if sha256_of(folder / name) != expected:
            raise CheckpointError(
                f"{folder / name} is not as the export wrote it (its SHA-256 differs from "
                f"{PROVENANCE}); changed code is not run: export again"
            )
    for source, name in _reached(folder):
        if name not in listed:
            raise CheckpointError(
                f"{folder / source} names {name}, which the export did not write; code of others "
                "is not run"
            )
    if trusted:
        return
    ours = _written_here(made)
    for name, found in listed.items():
        if ours.get(name) != found:
            raise CheckpointError(
                f"{folder / name} is not what gemoe_ds {__version__} writes; the folder says that "
                f"it is of gemoe_ds {made.get('gemoe_ds')}: export again, or say --trust-code if "
                "you know who made it"
            )


def _written_here(made: Mapping[str, Any]) -> dict[str, str]:
    """Checksums of the code that this package writes for the same model; none for anything that it
    would not be asked to write."""
    found = made.get(MADE_FROM)
    if not isinstance(found, dict):
        return {}
    try:
        replaced = {str(m): dict(lines) for m, lines in found["replaced"].items()}
        modules = [*replaced, *found["roots"], found["router"]]
        lines = [line for of_module in replaced.values() for line in of_module.values()]
        if not all(re.fullmatch(_MODULE, module) for module in modules):
            return {}
        if not all(_LINE.fullmatch(line) for line in lines):
            return {}
        with tempfile.TemporaryDirectory() as out:
            write_sources(Path(out), found["roots"], replaced, found["router"])
            return checksums(Path(out))
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, OSError):
        return {}  # of a version that writes other code


def _read(folder: Path) -> dict[str, Any]:
    """provenance.json, which has the list."""
    path = folder / PROVENANCE
    try:
        made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        made[KEY] = dict(made[KEY])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} lists no code by checksum ({KEY!r}): the folder is not of `gemoe export`, or "
            "of an older version; export again"
        ) from None
    return made


def _reached(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file of code that would run, after the file that names it."""
    waiting = [
        (path.name, reference)
        for path in sorted(folder.glob("*.json"))
        for reference in _auto_maps(path)
    ]
    seen = set()
    while waiting:
        source, name = waiting.pop()
        yield source, name
        if name not in seen and (folder / name).is_file():
            seen.add(name)
            waiting += [(name, inner) for inner in _imports(folder / name)]


def _auto_maps(path: Path) -> list[str]:
    """The files that `auto_map` of a JSON file names; `owner/name--file.py` for another folder's.

    References are `module.Class`, for tokenizers two of them in a list, either of them null.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return []
    found = content.get("auto_map") if isinstance(content, Mapping) else None
    values: list[Any] = list(found.values()) if isinstance(found, Mapping) else [found]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return [f"{str(one).rpartition('.')[0]}.py" for one in flat if one is not None]


def _imports(path: Path) -> list[str]:
    """The files beside it that a source imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [f"{name}.py" for name in names if name]
    return found
