"""results.json: the rows of a report, one an evaluation, measured against the backbone's own k."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemoe_ds.analysis.ablation import Ablation
from gemoe_ds.analysis.comparable import check_seeds
from gemoe_ds.analysis.gains import Gain
from gemoe_ds.analysis.record import EvalRecord, Key, load_json
from gemoe_ds.errors import DataError
from gemoe_ds.registry import ConfigModel

BASELINE = "top_k"  # with k = the backbone's own: what retention is measured against
LABELS = {
    "top_k": "Top-{k}",
    "top_k_tuned": "Top-{k}, tuned",
    "dynmoe": "DynMoE",
    "top_p": "Top-P",
    "adamoe": "AdaMoE",
    "moepp": "MoE++",
    "remoe": "ReMoE",
    "ada_k": "Ada-K",
    "zeda": "ZEDA",
    "beam": "BEAM",
    "dtop_p": "DTop-p",
    "ltdr": "LTDR",
    "evomoe": "EvoMoE",
    "gemoe": "GeMoE",
    "threshold": "Threshold",
    "score": "Score, untrained",
    "ratio": "Ratio to the best, untrained",
    "mass": "Top-p of the best, untrained",
    "entropy": "Entropy, untrained",
    "alloc_moe": "Alloc-MoE, untrained",
    "score_tuned": "Score, tuned gates",
    "ratio_tuned": "Ratio to the best, tuned gates",
    "mass_tuned": "Top-p of the best, tuned gates",
    "entropy_tuned": "Entropy, tuned gates",
    "alloc_moe_tuned": "Alloc-MoE, tuned gates",
    "gemoe_reversed": "GeMoE, reversed",
    "gemoe_mono_0": "GeMoE without L_mono",
    "gemoe_mono_0_5": "GeMoE, 0.5 L_mono",
    "gemoe_mono_1_5": "GeMoE, 1.5 L_mono",
}


class Row(EvalRecord):
    """A record and where it stands, both in percent."""

    retention: float  # 100 * accuracy / accuracy of the baseline
    sparsity: float  # 100 * (1 - mean_k / backbone_k)


class FigureFile(ConfigModel):
    """A figure of the report: its file in figures/ and what it shows."""

    file: str
    caption: str


class Meta(ConfigModel):
    """How and where the rows were measured."""

    command: str
    commit: str | None
    machine: str
    date: str
    seconds: float
    backbone_k: int
    figures: tuple[FigureFile, ...] = ()


@dataclass(frozen=True)
class Group:
    """The rows of one method, k and budget: its seeds."""

    method: str
    k: int | None
    budget_k: float | None  # the mean k that it was held to after training
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """Whatever the budget."""
        if self.method in LABELS:
            return LABELS[self.method].format(k=self.k)
        return self.method if self.k is None else f"{self.method}, k = {self.k}"

    @property
    def label(self) -> str:
        return self.name if self.budget_k is None else f"{self.name}, held to {self.budget_k:g}"

    @property
    def token_kinds(self) -> list[str]:
        """Those that all seeds tell apart; none in evaluations of earlier versions."""
        first, *others = (row.mean_k_by_token_kind for row in self.rows)
        return [kind for kind in first if all(kind in other for other in others)]

    @property
    def is_adaptive(self) -> bool:
        """Whether the method picks k for every token."""
        return self.k is None

    def values(self, of: Callable[[Row], float | None]) -> list[float]:
        """One value a seed, where it is defined."""
        return [value for value in map(of, self.rows) if value is not None]

    def mean(self, of: Callable[[Row], float | None]) -> float:
        return statistics.fmean(self.values(of))

    def sd(self, of: Callable[[Row], float | None]) -> float | None:
        """Sample standard deviation over seeds; None with fewer than two."""
        values = self.values(of)
        return statistics.stdev(values) if len(values) > 1 else None


class Results(ConfigModel):
    """Everything that the report says."""

    rows: tuple[Row, ...]
    meta: Meta
    ablations: tuple[Ablation, ...] = ()  # of some of the rows
    gains: tuple[Gain, ...] = ()  # of more experts, static, the backbone as it is

    @property
    def groups(self) -> list[Group]:
        """Fixed k first, largest k first, untuned before tuned; then the adaptive methods."""
        members: dict[tuple[str, int | None, float | None], list[Row]] = {}
        for row in self.rows:
            members.setdefault(row.key[:-1], []).append(row)

        def place(key: tuple[str, int | None, float | None]) -> tuple[object, ...]:
            method, k, budget_k = key
            return k is None, method != BASELINE, method, -(k or 0), -(budget_k or math.inf)

        return [
            Group(*key, tuple(sorted(members[key], key=lambda row: row.seed)))
            for key in sorted(members, key=place)
        ]

    def label(self, method: str, k: int | None) -> str:
        return Group(method, k, None, ()).label

    @property
    def baseline(self) -> Group:
        return next(g for g in self.groups if g.method == BASELINE and g.k == self.meta.backbone_k)

    @property
    def adaptive(self) -> list[Group]:
        """One of each method that picks k: as trained, else at the largest of its budgets."""
        return [group for group in self.one_each if group.is_adaptive]

    @property
    def one_each(self) -> list[Group]:
        """Of the groups that differ in their budget alone, the first."""
        found: dict[tuple[str, int | None], Group] = {}
        for group in self.groups:
            found.setdefault((group.method, group.k), group)
        return list(found.values())

    @property
    def kinds(self) -> list[str]:
        return sorted(self.rows[0].accuracy_by_kind)


def build_results(
    records: Sequence[EvalRecord], *, command: str, seconds: float | None = None
) -> Results:
    """Rows in the order of `records`; DataError if they cannot be compared with each other.

    `command` started the whole run, which took `seconds` (default: the sum over the records).
    """
    _check_comparable(records)
    backbone_k = records[0].backbone_k
    bases = [r.accuracy for r in records if r.method == BASELINE and r.k == backbone_k]
    if not bases:
        have = ", ".join(f"{r.method} k={r.k}" if r.k is not None else r.method for r in records)
        raise DataError(
            f"no evaluation of {BASELINE} with k={backbone_k} is among those given ({have}), and "
            f"retention is measured against it: evaluate the model with --k {backbone_k} too"
        )
    base = statistics.fmean(bases)
    if base == 0:
        raise DataError(
            f"{BASELINE} with k={backbone_k} answers no question right, so that nothing can be "
            "measured against it; evaluate a model that was trained"
        )
    rows = tuple(
        Row(
            **record.model_dump(),
            retention=100 * record.accuracy / base,
            sparsity=100 * (1 - record.mean_k / backbone_k),
        )
        for record in records
    )
    if seconds is None:
        seconds = sum(record.seconds + (record.train_seconds or 0) for record in records)
    commits = dict.fromkeys(record.commit or "unknown" for record in records)
    meta = Meta(
        command=command,
        commit=None if list(commits) == ["unknown"] else ", ".join(commits),
        machine="; ".join(dict.fromkeys(record.machine for record in records)),
        date=max(record.date for record in records),
        seconds=seconds,
        backbone_k=backbone_k,
    )
    return Results(rows=rows, meta=meta)


# What records that say it must have in common, beside their shapes.
_SAME = {
    "base weights": ("base_digest",),
    "samples (--data, --limit)": ("data_fingerprint", "limit"),
}


def _check_comparable(records: Sequence[EvalRecord]) -> None:
    """Same backbone and questions everywhere, and every method, k and seed once."""
    if not records:
        raise DataError("no evaluation was given: name at least one folder that holds eval.json")
    first = records[0]
    seen: set[Key] = set()
    for record in records:
        budget = "" if record.budget_k is None else f" held to {record.budget_k:g}"
        name = f"{record.method} k={record.k}{budget} seed={record.seed}"
        if record.key in seen:
            raise DataError(
                f"two of the evaluations are {name}: give each one once, or evaluate one of them "
                "with another --name"
            )
        seen.add(record.key)
        for field in ("backbone_k", "num_experts", "num_layers", "num_questions_by_kind"):
            here, there = getattr(record, field), getattr(first, field)
            if here != there:
                raise DataError(
                    f"{field} is {here} in the evaluation of {name} but {there} in that of "
                    f"{first.method} k={first.k} seed={first.seed}: they cannot share a table; "
                    "evaluate the same backbone on the same data"
                )
        for what, fields in _SAME.items():
            here, there = (tuple(getattr(r, f) for f in fields) for r in (record, first))
            if here[0] and there[0] and here != there:
                raise DataError(
                    f"{name} is of other {what} than {first.method} k={first.k} "
                    f"seed={first.seed}: they cannot share a table; evaluate the same backbone on "
                    "the same data"
                )
    rows: dict[tuple, list[tuple[str, EvalRecord]]] = {}
    for record in records:
        rows.setdefault(record.key[:-1], []).append((f"seed {record.seed}", record))
    for (method, *_), members in rows.items():
        check_seeds(method, members)


def read_results(path: Path) -> Results:
    """Read results.json back; DataError, one line, if it is missing, damaged or incomplete."""
    way_out = "make it again from the evaluation folders"
    results = load_json(path, Results, way_out)
    base = (BASELINE, results.meta.backbone_k)
    if base not in {(row.method, row.k) for row in results.rows}:
        raise DataError(f"{path} has no row of {BASELINE} with k={base[1]}: {way_out}")
    _check_comparable(results.rows)
    return results
