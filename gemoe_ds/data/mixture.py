"""Several folders of samples as one: their rows one after the other, each folder opened once."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
from pydantic import Field, FiniteFloat

from gemoe_ds.data.sample import Sample, SampleFolder, open_samples
from gemoe_ds.errors import ConfigError
from gemoe_ds.registry import ConfigModel, Reads

Positive = Annotated[FiniteFloat, Field(gt=0)]


class MixturePart(ConfigModel):
    """One of the folders of a mixture, as a recipe has it."""

    path: Annotated[str, Reads()] = Field(description="a folder written by `gemoe data convert`")
    repeat: Positive | None = Field(
        None,
        description="passes over it that are one epoch of the mixture; 0.5: half of it in an "
        "epoch, the other half in the next; null: 1",
    )
    weight: Positive | None = Field(
        None,
        description="share of the samples drawn, of the sum of all weights; instead of repeat; an "
        "epoch has as many samples as there are in all",
    )
    limit: int | None = Field(
        None, ge=1, description="at most so many of its samples, chosen at random by the seed"
    )
    name: str | None = Field(
        None, min_length=1, description="in the metrics; null: the name of the folder"
    )

    @property
    def called(self) -> str:
        return self.name or Path(self.path).name


class SampleList(Protocol):
    """A folder of samples, several of them, or some of their rows."""

    fingerprint: str

    @property
    def path(self) -> Path | str:
        """What errors call it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def outline(self, index: int) -> Sample:
        """Without the bytes of its pictures, if their sizes are known."""


class Mixture:
    """Folders in the order of a recipe; row i of the second one is row i behind all of the first.

    Its fingerprint is that of all of them. The names are those that the metrics use.
    """

    def __init__(self, folders: Sequence[SampleFolder], names: Sequence[str]) -> None:
        self.folders, self.names = tuple(folders), tuple(names)
        self.sizes = [len(folder) for folder in folders]
        self._ends = list(itertools.accumulate(self.sizes))
        prints = [folder.fingerprint for folder in folders]
        self.fingerprint = hashlib.sha256("".join(prints).encode()).hexdigest()
        self.path = "data.train_path of " + " + ".join(self.names)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        folder, row = self._place(index)
        return folder[row]

    def outline(self, index: int) -> Sample:
        folder, row = self._place(index)
        return folder.outline(row)

    def _place(self, index: int) -> tuple[SampleFolder, int]:
        """The folder of a row, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self._ends, index)
        return self.folders[part], index - (self._ends[part - 1] if part else 0)

    def part_of(self, row_R: np.ndarray) -> np.ndarray:
        """The number of the folder of each row, [R]."""
        return np.searchsorted(np.array(self._ends), row_R, side="right")


class Subset:
    """Some rows of other samples, in their order; its row i is the i-th of them."""

    def __init__(self, samples: SampleList, row_M: np.ndarray, path: str) -> None:
        self.samples, self.row_M, self.path = samples, row_M, path
        digest = hashlib.sha256(samples.fingerprint.encode() + row_M.astype(np.int64).tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.row_M)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[self._row(index)]

    def outline(self, index: int) -> Sample:
        return self.samples.outline(self._row(index))

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(self.row_M[index])


def check_parts(parts: Sequence[MixturePart]) -> None:
    """ConfigError if they do not go together."""
    if not parts:
        raise ConfigError("an empty list names no data; give a folder, or a list of {path: FOLDER}")
    for number, part in enumerate(parts, 1):
        if part.repeat is not None and part.weight is not None:
            raise ConfigError(
                f"part {number} ({part.path}) has repeat={part.repeat:g} and weight="
                f"{part.weight:g}: give passes an epoch, or a share of what is drawn, not both"
            )
        if not part.called or "/" in part.called or not part.called.isprintable():
            raise ConfigError(
                f"part {number}: metrics cannot be called {part.called!r}; give it a name without "
                "a slash (name: ...)"
            )
    weighted = [part.weight is not None for part in parts]
    if any(weighted) and not all(weighted):
        number = weighted.index(False) + 1
        raise ConfigError(
            f"part {number} ({parts[number - 1].path}) has no weight, and others have one: give "
            "every part a weight, or none"
        )
    name, times = Counter(part.called for part in parts).most_common(1)[0]
    if times > 1:
        raise ConfigError(
            f"{times} parts are called {name!r}; give each a name of its own (name: ...)"
        )


def paths_of(train_path: str | Sequence[MixturePart]) -> list[str]:
    """The folders that `data.train_path` names."""
    return [train_path] if isinstance(train_path, str) else [part.path for part in train_path]


def open_training(train_path: str | Sequence[MixturePart]) -> SampleFolder | Mixture:
    """What `data.train_path` names; DataError for a folder that cannot be opened.

    A folder that stands there twice is opened once.
    """
    if isinstance(train_path, str):
        return open_samples(train_path)
    folders: dict[str, SampleFolder] = {}
    for part in train_path:
        if part.path not in folders:
            folders[part.path] = open_samples(part.path)
    return Mixture([folders[p.path] for p in train_path], [p.called for p in train_path])
