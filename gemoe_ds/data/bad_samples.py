"""Samples that cannot be used: left out in their places, listed, and only so many of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gemoe_ds.errors import DataError, writing_to

FILE = Path("bad_samples") / "list.jsonl"  # in the folder of a run
_SHOWN = 10  # in the output; the file has all
_NAMED = 3  # in an error

Gather = Callable[[object], list]  # one object of each rank -> those of all ranks, on every rank


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
    The first rank lists them in the folder of the run, if it is given one.
    """

    def __init__(
        self, budget: float, num_samples: int, gather: Gather, output: Path | None = None
    ) -> None:
        self.budget, self.num_samples, self._gather = budget, num_samples, gather
        self._output = output
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

    def resume(self, step: int) -> None:
        """Remember what the run had met after its start up to `step`. Collective.

        Not what was too long, or known at its start: that is found anew, and may fit now.
        """
        kept = []
        if self._output and (self._output / FILE).is_file():
            for line in (self._output / FILE).read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, TypeError, KeyError):  # a line that a crash has cut
                    entry = json.loads(line)
                    at = entry.pop("step")
                    if 0 < at <= step and entry["needs"] is None:
                        kept.append((at, BadSample(**entry)))
            with writing_to(self._output):
                (self._output / FILE).unlink()
        kept, *_ = self._gather(kept)
        self._add(kept)

    def unknown(self, bad: Iterable[BadSample]) -> list[BadSample]:
        """Those that are not listed yet."""
        return [sample for sample in bad if sample.row not in self._found]

    def record(self, bad: Iterable[BadSample], step: int = 0) -> list[BadSample]:
        """List what this rank and the others have met; what of it is new. Collective."""
        here = self.unknown(bad)
        met = {sample.row: sample for of_rank in self._gather(here) for sample in of_rank}
        new = [met[row] for row in sorted(met)]
        self._add([(step, sample) for sample in new])
        return new

    def _add(self, found: list[tuple[int, BadSample]]) -> None:
        self._found |= {sample.row: (step, sample) for step, sample in found}
        if self._output is None or not found:
            return
        lines = [json.dumps({"step": step} | asdict(sample)) + "\n" for step, sample in found]
        with writing_to(self._output):
            path = self._output / FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as out:
                out.writelines(lines)

    @property
    def is_over(self) -> bool:
        return len(self) > self.limit or len(self) >= self.num_samples

    def check(self) -> None:
        """DataError on all ranks if there are too many."""
        if not self.is_over:
            return
        named = "; ".join(sample.reason for sample in self.samples[:_NAMED])
        more = f"; and {len(self) - _NAMED} more" if len(self) > _NAMED else ""
        if len(self) >= self.num_samples:
            raise DataError(f"none of {self.num_samples:,} samples can be used: {named}{more}")
        share = f" ({self.limit:,} of {self.num_samples:,})" if 0 < self.budget < 1 else ""
        number = "1 sample" if len(self) == 1 else f"{len(self):,} samples"
        raise DataError(
            f"{number} cannot be used, more than data.max_bad_samples={self.budget:g}{share}; "
            f"raise it, or data.max_length, or mend the data: {named}{more}"
        )


def listed(bad: list[BadSample]) -> list[str]:
    """A line for each sample, up to a number of them."""
    lines = [f"left out: {sample.reason}" for sample in bad[:_SHOWN]]
    more = len(bad) - _SHOWN
    return [*lines, f"left out: {more:,} more"] if more > 0 else lines
