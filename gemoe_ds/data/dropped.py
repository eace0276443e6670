"""Rows of a source that were left out: each with its reason, and how many for the like of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gemoe_ds.errors import DataError

LISTED_DROPS = 1000
MAX_BAD_FRACTION = 0.2  # of the rows, unless somebody says otherwise
DUPLICATE = "duplicate"  # a group that was asked for: no fault of the rows


@dataclass(frozen=True)
class Dropped:
    """A source row that was left out, and why."""

    id: str
    reason: str  # of this row
    group: str = "other"  # of all rows that are dropped for the like

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


class DropList:
    """The first ones, an example of each group, and the counts of all."""

    def __init__(self) -> None:
        self.first: list[Dropped] = []
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, Dropped] = {}

    def __len__(self) -> int:
        return self.counts.total()

    def append(self, dropped: Dropped) -> None:
        if len(self) < LISTED_DROPS:
            self.first.append(dropped)
        self.counts[dropped.group] += 1
        self.examples.setdefault(dropped.group, dropped)

    def add(self, later: DropList) -> None:
        """Those of the rows that follow."""
        self.first += later.first[: LISTED_DROPS - len(self.first)]
        self.counts.update(later.counts)
        self.examples = later.examples | self.examples

    def state(self) -> dict[str, Any]:
        """As JSON, which `of_state` reads."""
        return {
            "counts": self.counts,
            "examples": {group: asdict(row) for group, row in self.examples.items()},
            "first": [asdict(row) for row in self.first],
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> DropList:
        found = cls()
        found.counts = Counter(state["counts"])
        found.examples = {group: Dropped(**row) for group, row in state["examples"].items()}
        found.first = [Dropped(**row) for row in state["first"]]
        return found

    def check(self, source: str, total: int, max_bad_fraction: float) -> None:
        """DataError, one line, if none of `total` rows is left or too many are not.

        Duplicates are neither.
        """
        bad, total_but = (number - self.counts[DUPLICATE] for number in (len(self), total))
        if bad < total_but and bad <= max_bad_fraction * total_but:
            return
        why = ""
        if self.counts:
            groups = [f"{count} {group}" for group, count in self.counts.most_common()]
            example = self.examples[self.counts.most_common(1)[0][0]]
            why = f" ({', '.join(groups)})" if len(groups) > 1 else ""
            why += f"; first: {example}"
        if len(self) == total:
            raise DataError(f"{source}: none of {total} rows can be used{why}")
        raise DataError(
            f"{source}: {bad} of {total_but} rows cannot be used, more than "
            f"{max_bad_fraction:.0%} (--max-bad-fraction){why}"
        )

    def in_manifest(self) -> dict[str, Any]:
        return {
            "num_dropped": len(self),
            "dropped_groups": [
                {"group": group, "rows": count, "first": str(self.examples[group])}
                for group, count in self.counts.most_common()
            ],
            "dropped": [{"id": row.id, "reason": row.reason} for row in self.first],
        }
