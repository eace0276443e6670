"""How many tokens every sample has, before any is trained on: worked out once and kept.

From texts and the headers of images, so that 558k samples take minutes. `Lengths.cut` says what
`Collator.encode` makes of each at any `max_length`. Shapes: N samples, T turns of all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemoe_ds.console import Progress
from gemoe_ds.data.bad_samples import BadSample, Gather, alone
from gemoe_ds.data.collate import Collator, turn_lengths, without_target
from gemoe_ds.data.mixture import SampleList
from gemoe_ds.data.sample import SampleFolder
from gemoe_ds.errors import GemoeError, SampleError

SCHEMA = 2  # to be raised when `Collator` lays other sequences of the same template
_AT_ONCE = 512  # samples that are tokenised together
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, MemoryError)
_LOOKED_AT = 16  # samples by which kept lengths are checked


@dataclass(frozen=True)
class Cut:
    """What is left of every sample at one `max_length`: of a bad one a token of padding, of a
    dropped one nothing."""

    length_N: np.ndarray
    targets_N: np.ndarray
    image_N: np.ndarray  # tokens of images
    cut_answers_N: np.ndarray  # answers that are not there in whole, of bad samples too
    is_bad_N: np.ndarray
    is_dropped_N: np.ndarray  # too long, where these are dropped


@dataclass(frozen=True)
class Lengths:
    """Of a folder of samples, or of the rows that one rank has looked at."""

    first_N: np.ndarray  # int64: where the turns of a sample begin
    turns_T4: np.ndarray  # int32: see `turn_lengths`
    broken: dict[int, str]  # row -> why it cannot be used whatever its length

    def __len__(self) -> int:
        return len(self.first_N)

    @property
    def whole_N(self) -> np.ndarray:
        """Tokens of the uncut samples."""
        return self._summed(self.turns_T4[:, :3].sum(1, dtype=np.int64))

    @property
    def image_N(self) -> np.ndarray:
        """Tokens of all images of the uncut samples."""
        return self._summed(self.turns_T4[:, 3].astype(np.int64))

    def cut(self, max_length: int, *, drop: bool = False) -> Cut:
        """`drop`: samples that would lose a token are left out instead."""
        question_T, answer_T, end_T, image_T = self.turns_T4.T.astype(np.int64)
        sizes_N = np.diff(self.first_N, append=len(question_T))
        sample_T = np.repeat(np.arange(len(self)), sizes_N)
        whole_T = question_T + answer_T + end_T
        behind_T = np.cumsum(whole_T)  # over all samples; then from the start of each
        before_N = np.concatenate([[0], behind_T])[self.first_N]
        behind_T = behind_T - before_N[sample_T]
        room_T = max_length - (behind_T - whole_T) - question_T
        fits_T = answer_T + end_T <= room_T
        turn_T = np.arange(len(sample_T)) - self.first_N[sample_T]
        kept_N = sizes_N.copy()  # whole turns: those before the first one that does not fit
        np.minimum.at(kept_N, sample_T[~fits_T], turn_T[~fits_T])
        is_kept_T = turn_T < kept_N[sample_T]
        length_N = self._summed(np.where(is_kept_T, whole_T, 0))
        targets_N = self._summed(np.where(is_kept_T, answer_T + end_T, 0))
        image_N = self._summed(np.where(is_kept_T, image_T, 0))
        # No whole turn: a part of the first answer.
        in_part_N = (kept_N == 0) & (sizes_N > 0)
        first_N = self.first_N[in_part_N]
        part_N = np.minimum(room_T[first_N], answer_T[first_N]).clip(min=0)
        length_N[in_part_N] += question_T[first_N] + part_N
        targets_N[in_part_N] = part_N
        image_N[in_part_N] += image_T[first_N]
        is_bad_N = targets_N == 0
        is_bad_N[[*self.broken]] = True
        is_dropped_N = (self.whole_N > max_length) & drop
        is_dropped_N[[*self.broken]] = False
        is_bad_N &= ~is_dropped_N
        length_N = np.where(is_bad_N, 1, np.where(is_dropped_N, 0, length_N))
        targets_N = np.where(is_bad_N | is_dropped_N, 0, targets_N)
        image_N = np.where(is_bad_N | is_dropped_N, 0, image_N)
        cut_answers_N = np.where(is_dropped_N, 0, sizes_N - kept_N)
        return Cut(length_N, targets_N, image_N, cut_answers_N, is_bad_N, is_dropped_N)

    def bad_samples(
        self, samples: SampleList, max_length: int, rows: Iterable[int]
    ) -> list[BadSample]:
        """Why each of these rows cannot be used."""
        found = []
        for row in map(int, rows):
            name, turns_T4 = samples.outline(row).id, self._turns_of(row)
            before, whole = int(turns_T4[:1, 0].sum()), int(turns_T4[:, :3].sum())
            targets = int(turns_T4[:, 1:3].sum())
            error = without_target(name, before, whole, targets, max_length)
            reason, needs = self.broken.get(row, str(error)), error.needs
            found.append(BadSample(row, name, reason, None if row in self.broken else needs))
        return found

    def _summed(self, value_T: np.ndarray) -> np.ndarray:
        """Over the turns of each sample."""
        ends_N = np.append(self.first_N[1:], len(value_T))
        sums = np.concatenate([[0], np.cumsum(value_T)])
        return np.asarray(sums[ends_N] - sums[self.first_N])

    def _turns_of(self, row: int) -> np.ndarray:
        end = self.first_N[row + 1] if row + 1 < len(self) else len(self.turns_T4)
        return self.turns_T4[self.first_N[row] : end]

    def of_rows(self, row_M: np.ndarray) -> Lengths:
        """Of some of the rows, in this order."""
        first_M = self.first_N[row_M]
        sizes_M = np.append(self.first_N[1:], len(self.turns_T4))[row_M] - first_M
        starts_M = np.cumsum(sizes_M) - sizes_M
        turn_U = np.repeat(first_M - starts_M, sizes_M) + np.arange(sizes_M.sum())
        places = {row: place for place, row in enumerate(row_M.tolist()) if row in self.broken}
        broken = {place: self.broken[row] for row, place in places.items()}
        return Lengths(starts_M, self.turns_T4[turn_U], broken)

    @classmethod
    def joined(cls, parts: Sequence[Lengths]) -> Lengths:
        """Of rows that follow each other."""
        first, row = 0, 0
        firsts: list[np.ndarray] = []
        broken: dict[int, str] = {}
        for part in parts:
            firsts.append(part.first_N + first)
            broken |= {row + at: reason for at, reason in part.broken.items()}
            first, row = first + len(part.turns_T4), row + len(part)
        turns_T4 = np.concatenate([part.turns_T4 for part in parts])
        return cls(np.concatenate(firsts), turns_T4, broken)


def measured(
    samples: SampleFolder,
    collator: Collator,
    rows: Sequence[int],
    *,
    show_progress: bool = False,
    stops: Callable[[], bool] = lambda: False,
) -> Lengths | None:
    """Of these rows; None if it was asked to stop."""
    firsts, turns = array("q"), array("i")  # not a Python object a number
    broken: dict[int, str] = {}
    bar = Progress(
        total=len(rows), desc="lengths", unit="sample", disable=not show_progress, delay=1.0
    )
    for begin in range(0, len(rows), _AT_ONCE):
        if stops():
            return None
        some = [samples.outline(row) for row in rows[begin : begin + _AT_ONCE]]
        for at, (sample, of_sample) in enumerate(
            zip(some, collator.tokenized(some), strict=True), begin
        ):
            tokens = []
            try:
                tokens = collator.image_tokens(sample)
            except SampleError as error:
                broken[at] = str(error)
            firsts.append(len(turns) // 4)
            for of_turn in turn_lengths(of_sample, tokens):
                turns.extend(of_turn)
        bar.update(len(some))
    bar.close()
    return Lengths(
        np.array(firsts, dtype=np.int64),
        np.array(turns, dtype=np.int32).reshape(-1, 4),
        broken,
    )


def known_lengths(
    samples: SampleFolder,
    collator: Collator,
    *,
    rank: int = 0,
    world: int = 1,
    gather: Gather = alone,
    others: Sequence[Path] = (),
    stops: Callable[[], bool] = lambda: False,
) -> tuple[Lengths | None, Path | None]:
    """On the first rank the lengths, and the file that they are kept in, if there is one.

    Read from beside the data or from `others` (folders), or worked out by all ranks together and
    kept beside the data, if that can be written to. None, too, if a rank was asked to stop.
    Collective.
    """
    name = file_name(samples, collator)
    kept = None
    if rank == 0:
        files = [folder / name for folder in (samples.path, *others)]
        kept = next(((found, f) for f in files if (found := _read(f, samples, collator))), None)
    if gather(kept is not None)[0]:
        return kept or (None, None)
    ends = [len(samples) * r // world for r in range(world + 1)]
    rows = range(ends[rank], ends[rank + 1])
    part: Lengths | GemoeError | None
    try:
        part = measured(samples, collator, rows, show_progress=rank == 0, stops=stops)
    except GemoeError as error:
        part = error  # all say it, so that no rank waits for another
    parts = gather(part)
    for failure in parts:
        if isinstance(failure, GemoeError):
            raise failure
    if rank > 0 or any(of_rank is None for of_rank in parts):
        return None, None
    lengths = Lengths.joined(parts)
    return lengths, keep(lengths, samples.path / name)


def keep(lengths: Lengths, file: Path) -> Path | None:
    """Write them; None where that cannot be."""
    partial = file.with_name(f".{file.name}-{os.getpid()}")
    arrays = {f.name: getattr(lengths, f.name) for f in dataclasses.fields(lengths)}
    arrays["broken"] = np.array(json.dumps(lengths.broken))
    try:
        with partial.open("wb") as out:
            np.savez_compressed(out, **arrays)
        os.replace(partial, file)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        return None
    return file


def _read(file: Path, samples: SampleFolder, collator: Collator) -> Lengths | None:
    """What a file holds; None if it is not there, damaged, or of other sequences."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            broken = {int(row): str(why) for row, why in json.loads(str(arrays["broken"])).items()}
            found = Lengths(arrays["first_N"], arrays["turns_T4"], broken)
        rows = np.linspace(0, len(samples) - 1, _LOOKED_AT, dtype=int).tolist()
        now = measured(samples, collator, rows)
        if len(found) != len(samples) or now is None:
            return None
        for at, row in enumerate(rows):
            if not np.array_equal(now._turns_of(at), found._turns_of(row)):
                return None
        found.cut(1)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, *_MALFORMED):
        return None  # a damaged shard, too: all ranks will meet it, and say it together
    return found


def file_name(samples: SampleFolder, collator: Collator) -> str:
    return f"lengths-{fingerprint(samples, collator)[:16]}.npz"


def fingerprint(samples: SampleFolder, collator: Collator) -> str:
    """Of all that lengths depend on."""
    tokenizer, layout = collator.tokenizer, collator.layout
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))
    settings = [] if layout is None else [type(layout).__name__, *map(_said, vars(layout).values())]
    parts = [SCHEMA, samples.fingerprint, vocabulary, repr(collator.conversations.chat), settings]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _said(setting: object) -> str:
    """A setting of an image layout: a number, or a whole processor."""
    as_json = getattr(setting, "to_json_string", None)
    return str(as_json()) if as_json else repr(setting)
