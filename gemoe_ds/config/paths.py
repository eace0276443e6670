"""Where the files that a recipe names are: one order of places for every path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gemoe_ds.config import hub
from gemoe_ds.errors import ConfigError
from gemoe_ds.registry import ConfigModel, Reads

ROOT = Path(__file__).resolve().parents[2]  # of launch/recipes, ds_configs, launch/slurm

_ONLY_A_PATH = Reads()

M = TypeVar("M", bound=ConfigModel)


@dataclass(frozen=True)
class Places:
    """Folders in the order in which a relative path is looked for."""

    folders: tuple[Path, ...]

    @classmethod
    def beside(cls, *files: Path) -> Places:
        """The working directory, then the folders of these files, then the package."""
        folders = [Path.cwd(), *(Path(os.path.abspath(file.parent)) for file in files), ROOT]
        return cls(tuple(dict.fromkeys(folders)))

    def locate(self, key: str, text: str, reads: Reads = _ONLY_A_PATH) -> Path:
        """The absolute path of what `text` names; ConfigError says where was looked in vain."""
        said = f"{key}={text}" if key else text
        if not text.strip():
            raise ConfigError(f"{said}: is empty; give a path")
        path = Path(text)
        if text.startswith("~"):
            path = Path(os.path.expanduser(text))
        for folder in self.folders:
            found = os.path.abspath(folder / path)  # symbolic links stay as they are
            if os.path.exists(found):
                path = Path(found)
                return hub.snapshot_in(path, said, reads.of_hub) if reads.of_hub else path
        looked = "" if path.is_absolute() else f" (looked in {', '.join(map(str, self.folders))})"
        words = f"; it may also be {' or '.join(reads.words)}" if reads.words else ""
        missing = f"{said}: no such file or folder{looked}{words}"
        if reads.of_hub:
            return hub.snapshot_of(text, said, reads.of_hub, missing)
        raise ConfigError(missing)


def inputs(model: ConfigModel, prefix: str = "") -> Iterator[tuple[str, str, Reads]]:
    """Key, value and mark of every option that names something to read."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        marks = [mark for mark in field.metadata if isinstance(mark, Reads)]
        if isinstance(value, ConfigModel):
            # a choice (model.router) and its options are one mapping of a recipe
            inner = prefix if name == "config" else f"{prefix}{name}."
            yield from inputs(value, inner)
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
        elif marks and isinstance(value, str) and value not in marks[0].words:
            with suppress(ConfigError):  # which `check_paths` raises
                update[name] = str(places.locate(name, value, marks[0]))
    return model.model_copy(update=update) if update else model
