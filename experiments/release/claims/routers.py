"""What the pages of routers and of analysis say; what has run of the contest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from experiments.release.claim import ByHand, Claim
from experiments.release.claims.readme import CONTEST, MEASURED, trained_on_captions
from experiments.release.results import Results, Row

PAGE, ANALYSIS = "docs/routers.md", "docs/analysis.md"


def _standings(results: Results) -> list[Row]:
    """A list with one entry for each model and training set; the contest's first one leads."""
    found: list[Row] = results.json(CONTEST)
    return found


def _others(results: Results) -> list[Row]:
    """The other models, trained as the first one was."""
    first, *more = _standings(results)
    return [one for one in more if one["training"] == first["training"]]


def _contest_rows(results: Results) -> dict[str, Row]:
    rows: dict[str, Row] = results.json(MEASURED)["grid"]["rows"]
    return rows


def _to_ours(standing: Row) -> dict[tuple[str, float], Row]:
    """Differences to ours by row and mean k; above 0 where the row is better."""
    found = {}
    for name, one in standing["at"].items():
        row, k = name.split(" ")
        if one["to_ours"]:
            found[row, float(k)] = one["to_ours"]
    return found


def _interval(k: float, value: float, low: float, high: float) -> str:
    """In points."""
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}] at k {k:g}"


def _sign(difference: Row) -> int:
    """1 or -1 for a 95 % interval that leaves out 0, else 0."""
    return (difference["low"] > 0) - (difference["high"] < 0)


def _and(parts: Iterable[Any], empty: str = "no row") -> str:
    *first, last = [str(part) for part in parts] or [empty]
    return f"{', '.join(first)} and {last}" if first else last


def _code(rows: Iterable[str]) -> list[str]:
    return [f"`{row}`" for row in rows]


def _what_has_run(results: Results) -> str:
    contest = results.json(MEASURED)
    runs = {
        # what nothing is trained for is one run, whatever its points
        (
            m["backbone"],
            m["training"],
            m["row"],
            m["seed"],
            None if m["seed"] is None else m["value"],
        )
        for m in contest["measured"]
    }
    trained = {
        (m["backbone"], m["training"], m["row"], m["seed"], m["value"]): m["train_seconds"] or 0
        for m in contest["measured"]
    }
    seconds = sum(trained.values()) + sum(m["seconds"] for m in contest["measured"])
    return (
        f"**What has run**: {len(runs)} of the {len(runs) + len(contest['missing'])} runs of the "
        f"grid, in {seconds / 3600:.1f} hours of one core. Rows are named as the grid names them:"
    )


def _table_of_runs(results: Results) -> str:
    """Rows by model, training set and number of router seeds."""
    seeds: dict[tuple[str, str, str], set[int | None]] = {}
    for m in results.json(MEASURED)["measured"]:
        seeds.setdefault((m["backbone"], m["training"], m["row"]), set()).add(m["seed"])
    groups: dict[tuple[str, str, int], list[str]] = {}
    for (backbone, training, row), found in seeds.items():
        groups.setdefault((backbone, training, len(found - {None})), []).append(row)
    lines = ["| model | training | router seeds | rows |", "|---|---|---|---|"]
    for (backbone, training, number), rows in groups.items():
        trained = f"{training} | {number}" if number else "none |"
        lines.append(f"| `{backbone}` | {trained} | {', '.join(_code(rows))} |")
    return "\n".join(lines)


def _not_run(results: Results) -> str:
    """Rows of the grid without a run of the first model, by training set."""
    measured, first = results.json(MEASURED)["measured"], _standings(results)[0]["backbone"]
    rows = [row for row, of in _contest_rows(results).items() if of["gates"] != "untouched"]
    parts = []
    for training in ("mixed", "captions"):
        ran = {m["row"] for m in measured if (m["backbone"], m["training"]) == (first, training)}
        if lacking := [row for row in rows if row not in ran]:
            parts.append(f"{_and(_code(lacking))} ({training})")
    return f"No runs of `{first}` yet: {'; '.join(parts)}." if parts else f"All ran on `{first}`."


def _at_each_k(standing: Row, wanted: Callable[[int], bool]) -> dict[float, list[str]]:
    """By mean k, the rows whose difference to ours has a wanted sign."""
    found: dict[float, list[str]] = {}
    for (row, k), difference in _to_ours(standing).items():
        found.setdefault(k, []).extend([row] * wanted(_sign(difference)))
    return dict(sorted(found.items()))


def _better(standing: Row) -> str:
    """Who is significantly better than ours, and at which mean k."""
    at: dict[str, list[str]] = {}
    for k, rows in _at_each_k(standing, lambda sign: sign > 0).items():
        for row in rows:
            at.setdefault(row, []).append(f"{k:g}")
    if not at:
        ks = sorted({k for _, k in _to_ours(standing)})
        return f"no row is significantly better than `threshold` at k {_and(f'{k:g}' for k in ks)}"
    better = _and(f"`{row}` at k {_and(ks)}" for row, ks in at.items())
    return f"significantly better than `threshold`: {better}"


def _first_model(results: Results) -> str:
    first = _standings(results)[0]
    return (
        f"On `{first['backbone']}` {_better(first)}. Of the rows that reach a mean k, `threshold` "
        f"is significantly better than {_worse(first)}."
    )


def _worse(standing: Row) -> str:
    """The rows that ours is significantly better than, by naming the others at each mean k."""
    parts = []
    for k, rows in _at_each_k(standing, lambda sign: sign >= 0).items():
        parts.append(f"all but {_and(_code(rows))} at {k:g}" if rows else f"all others at {k:g}")
    return _and(parts, "none")


def _other_models(results: Results) -> str:
    """Whether the signs of the first model's significant differences return, and GeMoE's."""
    first = _standings(results)[0]
    clear = {key: d for key, d in _to_ours(first).items() if _sign(d)}
    sentences = []
    for other in _others(results):
        there = _to_ours(other)
        both = [key for key in clear if key in there]
        same = [key for key in both if clear[key]["value"] * there[key]["value"] > 0]
        gemoe = -100 * there["gemoe", 3.0]["value"]
        sentences.append(
            f"On `{other['backbone']}` {len(same)} of {len(both)} significant differences of "
            f"`{first['backbone']}` have the same sign; {_better(other)}. At k 3 `threshold` is "
            f"above `gemoe` by {gemoe:.2f} points."
        )
    return " ".join(sentences)


def _captions(results: Results) -> str:
    """Ours minus the best row without training, where ours saw captions alone."""
    found, grid, parts = trained_on_captions(results), _contest_rows(results), []
    for k in sorted({k for _, k in _to_ours(found)}):
        free = [row for row, at in _to_ours(found) if at == k and grid[row]["gates"] == "untouched"]
        best = max(free, key=lambda row: float(found["at"][f"{row} {k:g}"]["accuracy"]["value"]))
        to_ours = _to_ours(found)[best, k]
        value, low, high = (-100 * to_ours[name] for name in ("value", "high", "low"))
        parts.append(_interval(k, value, low, high))
    return f"minus the best rule without training is {_and(parts)}"


def _rivals_on_captions(results: Results) -> str:
    """The same of the rows that train."""
    found, grid = trained_on_captions(results), _contest_rows(results)
    kept = {n: one for n, one in found["at"].items() if grid[n.split()[0]]["gates"] != "untouched"}
    trained = found | {"at": kept}
    return (
        f"Of the rows that were trained on captions, too, {_better(trained)}; it is significantly "
        f"better than {_worse(trained)}."
    )


def _entropy_input(results: Results) -> str:
    """GeMoE with its predictor on the entropy minus GeMoE on tokens, on the demo's tasks."""
    parts = []
    for name, one in _standings(results)[0]["at"].items():
        row, k = name.split(" ")
        if row == "gemoe_entropy":
            found = (100 * one["to_reference"][bound] for bound in ("value", "low", "high"))
            parts.append(_interval(float(k), *found))
    return f"`entropy` minus `token` is {_and(parts)}"


def _free_experts(results: Results) -> str:
    """The mean k of MoE++, of all seeds, by its number of experts and by its balance loss."""

    def span(value: str) -> str:
        where = {"backbone": "annealed", "training": "mixed", "value": value}
        found = [row["mean_k"] for row in results.rows(MEASURED, "measured", row="moepp", **where)]
        return f"{min(found):.2f} to {max(found):.2f}"

    return (
        f"MoE++ with 150 zero-computation experts uses {span('free_150')} at the balance loss that "
        f"it has by default, and {span('balanced_hard')} at `tau: 0.1, balance_weight: 3`"
    )


_ON_CAPTIONS = """
Trained on captions only (150 steps, one seed, validation, held to a mean k afterwards; the
untouched top-8 has 83.1 %):

| mean k | `token` | `entropy` |
|---|---|---|
| 5 | 81.6 | 83.0 |
| 4 | 78.9 | 82.6 |
| 3 | 75.8 | 81.0 |
"""

CLAIMS = [
    Claim(
        PAGE,
        _ON_CAPTIONS,
        ByHand(
            "gemoe train experiments/recipes/demo_gemoe.yaml train.steps=150 "
            "data.train_path=runs/demo/data/captions model.router.predictor_input=token|entropy; "
            "gemoe evaluate RUN/config.yaml --trained RUN --mean-k 5 4 3",
            commit="fc53db4",
            machine="not noted",
            date="2026-11-28",
        ),
    ),
    Claim(
        PAGE,
        "With importance, such a model lost up to 2 points at k 3 and 7 at k 2.",
        ByHand(
            "gemoe train experiments/recipes/demo_threshold.yaml "
            "data.train_path=runs/demo/data/captions, with and without "
            "model.router.importance=false",
            commit="7fb5702",
            machine="not noted",
            date="2026-11-28",
        ),
    ),
    Claim(PAGE, _entropy_input),
    Claim(PAGE, _what_has_run),
    Claim(PAGE, _table_of_runs),
    Claim(PAGE, _not_run),
    Claim(PAGE, _first_model),
    Claim(PAGE, _other_models),
    Claim(PAGE, _captions),
    Claim(PAGE, _rivals_on_captions),
    Claim(PAGE, _free_experts),
]

NOT_MEASURED = {
    PAGE: [
        "arXiv 2606.26287",
        "CE + 1.0 L_mono + 0.001 L_lb",
        "1.2 per bit of entropy difference",
        "`importance_weight` (0.05)",
        "`memory` (0.95)",
        "`train_mean_k` (1.5 to `k_high`)",
        "cross-entropy, 0.001 load balance",
        "arXiv 2604.08133",
        "the target (within 0.5 %)",
        "missed by more than 2 %",
        "a mask above 0.5 within top-k",
        "at the code's 0.01",
        "its strength is 0.01 times",
        "**Paired 95 % intervals**",
        "at least 92 of 100 intervals",  # tests/analysis/test_paired.py
        # the paper's, and counts: tests/experiments/test_published.py, tests/models
        "1.58 B (MolmoE) and 1.17 B (DeepSeek-VL2-Tiny)",
        "1.57 B and 1.16 B",
    ],
    ANALYSIS: [
        "1.2 x entropy - rank",
        "Intervals (95 %)",
        # tests/analysis/test_routing_sums.py, tests/evaluation/test_cost.py
        "less than .002 in all that was tried where entropies spread by 0.5 %",
        "less than 5 % of a scoring forward",
        "Evaluations of 0.1",
    ],
}
