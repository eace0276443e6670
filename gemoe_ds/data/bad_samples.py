"""Samples that cannot be used: left out in their places, listed, and only so many of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gemoe_ds.errors import DataError, writing_to

FILE = Path("bad_samples") / "list.jsonl"  # in the folder of a run
REFUSED = FILE.with_name("refused.jsonl")  # of a run that did not begin because of them
SHOWN = 10  # in the output; the file has all
_NAMED = 3  # in an error

Gather = Callable[[object], list]  # one object of each rank -> those of all ranks, on every rank


def alone(here: object) -> list:
    """`Gather` of a rank that has no others."""
    return [here]


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, and why. `needs`: its tokens, if it is too long."""

    row: int
    id: str
    reason: str
    needs: int | None = None


class BadSampleLog:
    """What all ranks have left out, by row: a sample that two of them meet counts once.

    `budget` is `data.max_bad_samples`: a number over all ranks or, below 1, a share of the data.
    """

    def __init__(self, budget: float, num_samples: int, gather: Gather) -> None:
        self.budget, self.num_samples, self.gather = budget, num_samples, gather
        self._output: Path | None = None
        self._file: Path | None = None  # the list, on all ranks
        self._found: dict[int, tuple[int, BadSample]] = {}  # row -> step and sample

    def __len__(self) -> int:
        return len(self._found)

    @property
    def samples(self) -> list[BadSample]:
        """By row."""
        return [self._found[row][1] for row in sorted(self._found)]

    @property
    def limit(self) -> int:
        """Samples that may be left out."""
        share = self.budget * self.num_samples + 1e-6  # 0.29 * 100 is 28.999...
        return int(share if self.budget < 1 else self.budget)

    def keep_in(self, output: Path | None, step: int) -> None:
        """List them in the folder of a run, which is given to the first rank, from `step` on.

        What the run had met by then is remembered, but for what was known at its start: that is
        found anew, and may fit now. Collective.
        """
        met = []
        if output and (output / FILE).is_file():
            for line in (output / FILE).read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, TypeError, KeyError):  # a line that a crash has cut
                    entry = json.loads(line)
                    at = entry.pop("step")
                    if 0 < at <= step and entry["needs"] is None:
                        met.append((at, BadSample(**entry)))
            with writing_to(output):
                (output / FILE).unlink()
        met, self._file = self.gather((met, output and output / FILE))[0]
        self._found = {sample.row: (at, sample) for at, sample in met} | self._found
        self._output = output
        self._write(list(self._found.values()))

    def unknown(self, bad: Iterable[BadSample]) -> list[BadSample]:
        """Those that are not listed yet."""
        return [sample for sample in bad if sample.row not in self._found]

    def record(self, bad: Iterable[BadSample], step: int = 0) -> list[BadSample]:
        """List what this rank and the others have met; what of it is new. Collective."""
        here = self.unknown(bad)
        met = {sample.row: sample for of_rank in self.gather(here) for sample in of_rank}
        new = [met[row] for row in sorted(met)]
        self._found |= {sample.row: (step, sample) for sample in new}
        self._write([(step, sample) for sample in new])
        return new

    def _write(self, found: list[tuple[int, BadSample]]) -> None:
        if self._output is None or not found:
            return
        write_list(self._output, FILE, found, "a")

    def allows(self, number: int) -> bool:
        return number <= self.limit and number < self.num_samples

    def check(self, number: int | None = None, file: Path | None = None) -> None:
        """DataError if there are too many: those listed, or so many, which `file` lists."""
        number = len(self) if number is None else number
        if self.allows(number):
            return
        named = "; ".join(sample.reason for sample in self.samples[:_NAMED])
        more = f"; and {number - _NAMED:,} more" if number > _NAMED else ""
        if file := file or self._file:
            more += f"; the list is in {file}"
        if number >= self.num_samples:
            raise DataError(f"none of {self.num_samples:,} samples can be used: {named}{more}")
        share = f" ({self.limit:,} of {self.num_samples:,})" if 0 < self.budget < 1 else ""
        some = "1 sample" if number == 1 else f"{number:,} samples"
        raise DataError(
            f"{some} cannot be used, more than data.max_bad_samples={self.budget:g}{share}; "
            f"raise it, or data.max_length, or mend the data: {named}{more}"
        )


def write_list(
    output: Path, file: Path, found: Iterable[tuple[int, BadSample]], mode: str = "w"
) -> None:
    """Steps and samples, a line each, into the folder of a run."""
    lines = [json.dumps({"step": step} | asdict(sample)) + "\n" for step, sample in found]
    with writing_to(output):
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        with (output / file).open(mode, encoding="utf-8") as out:
            out.writelines(lines)


def listed(bad: list[BadSample], number: int | None = None) -> list[str]:
    """A line for each sample, up to some; `number`: how many there are, if not all are here."""
    lines = [f"left out: {sample.reason}" for sample in bad[:SHOWN]]
    more = (number or len(bad)) - SHOWN
    return [*lines, f"left out: {more:,} more"] if more > 0 else lines
