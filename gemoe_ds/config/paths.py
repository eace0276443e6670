"""Where the files that a recipe names are: one order of places for every path."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gemoe_ds.config import hub
from gemoe_ds.errors import ConfigError
from gemoe_ds.registry import ConfigModel, Reads

PACKAGE = Path(__file__).resolve().parents[1]  # of recipes/, ds_configs/, slurm/
_ABOVE = PACKAGE.parent
CHECKOUT = _ABOVE if (_ABOVE / "launch" / "train.py").is_file() else None  # None: installed

RECIPE = Reads(shipped="recipes")
TEMPLATE = Reads(shipped="slurm")
_ONLY_A_PATH = Reads()

M = TypeVar("M", bound=ConfigModel)


@dataclass(frozen=True)
class Places:
    """Folders in the order in which a relative path is looked for."""

    folders: tuple[Path, ...]

    @classmethod
    def beside(cls, *files: Path) -> Places:
        """The working directory, then the folders of these files, then the checkout."""
        folders = [Path.cwd(), *(Path(os.path.abspath(file.parent)) for file in files)]
        return cls(tuple(dict.fromkeys([*folders, CHECKOUT] if CHECKOUT else folders)))

    def locate(self, key: str, text: str, reads: Reads = _ONLY_A_PATH) -> Path:
        """The absolute path of what `text` names; ConfigError says where was looked in vain."""
        said = f"{key}={text}" if key else text
        if not text.strip():
            raise ConfigError(f"{said}: is empty; give a path")
        path = Path(text)
        if text.startswith("~"):
            path = Path(os.path.expanduser(text))
        folders: list[str] = []  # in the place of a file
        for folder in self.folders:
            found = os.path.abspath(folder / path)  # symbolic links stay as they are
            if os.path.exists(found):
                if reads.shipped and os.path.isdir(found):
                    folders.append(found)
                    continue
                path = Path(found)
                return hub.snapshot_in(path, said, reads.of_hub) if reads.of_hub else path
        if reads.shipped and (file := _shipped_file(path, reads.shipped)):
            return file
        if folders:
            raise ConfigError(f"{said}: {folders[0]} is a folder; give a file")
        looked = "" if path.is_absolute() else f" (looked in {', '.join(map(str, self.folders))})"
        words = f"; it may also be {' or '.join(reads.words)}" if reads.words else ""
        missing = f"{said}: no such file or folder{looked}{words}{_names_near(path, reads.shipped)}"
        if reads.of_hub:
            return hub.snapshot_of(text, said, reads.of_hub, missing)
        raise ConfigError(missing)


def shipped(folder: str) -> dict[str, Path]:
    """What this folder of the package holds, by name."""
    files = sorted((PACKAGE / folder).glob("[!_.]*")) if folder else []
    return {file.stem: file for file in files}


def _shipped_file(path: Path, folder: str) -> Path | None:
    """`zero2`, `zero2.json` or `ds_configs/zero2.json`, in the package."""
    if str(path.parent) not in (".", folder, f"launch/{folder}"):
        return None
    file = shipped(folder).get(path.stem)
    return file if file and path.name in (file.stem, file.name) else None


def _names_near(path: Path, folder: str) -> str:
    """The way out for a name that is none."""
    if not (names := list(shipped(folder))):
        return ""
    near = difflib.get_close_matches(path.stem, names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"; give a path, or the name of one that ships{hint}: {', '.join(names)}"


def inputs(model: ConfigModel, prefix: str = "") -> Iterator[tuple[str, str, Reads]]:
    """Key, value and mark of every option that names something to read."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        marks = [mark for mark in field.metadata if isinstance(mark, Reads)]
        if isinstance(value, ConfigModel):
            # a choice (model.router) and its options are one mapping of a recipe
            inner = prefix if name == "config" else f"{prefix}{name}."
            yield from inputs(value, inner)
        elif isinstance(value, tuple):
            for number, one in enumerate(value):
                if isinstance(one, ConfigModel):
                    yield from inputs(one, f"{prefix}{name}[{number}].")
        elif marks and isinstance(value, str) and value not in marks[0].words:
            yield f"{prefix}{name}", value, marks[0]


def located(model: M, places: Places) -> M:
    """`model` with the absolute paths of what is there; the rest stays as it is written."""
    update: dict[str, object] = {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        marks = [mark for mark in field.metadata if isinstance(mark, Reads)]
        if isinstance(value, ConfigModel):
            if (inner := located(value, places)) is not value:
                update[name] = inner
        elif isinstance(value, tuple) and any(isinstance(one, ConfigModel) for one in value):
            update[name] = tuple(located(one, places) for one in value)
        elif marks and isinstance(value, str) and value not in marks[0].words:
            with suppress(ConfigError):  # which `check_paths` raises
                update[name] = str(places.locate(name, value, marks[0]))
    return model.model_copy(update=update) if update else model


def check_output(output_dir: str) -> None:
    """Raise ConfigError for an output_dir that is, or lies in, or holds as its checkpoints, what is
    no folder."""
    output = Path(output_dir).absolute()
    try:
        output.exists()
    except OSError as error:  # a name that is too long, a folder that is not ours to enter
        raise ConfigError(
            f"output_dir={output_dir:.200}: {error.strerror}; give another folder"
        ) from None
    folders = (output / "checkpoints", output, *output.parents)
    there = next(path for path in folders if os.path.lexists(path))
    if not there.is_dir():
        what = "a link to nothing" if not there.exists() else "a file"
        said = f"output_dir={output_dir}: " + ("" if there == output else f"{there} ")
        raise ConfigError(f"{said}is {what}; give a folder")
