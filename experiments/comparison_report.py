"""The comparison as Markdown: the paper's Tables 1, 2 and 5 on this backbone, and what they say."""

from __future__ import annotations

from experiments.comparison import ABLATIONS, Comparison
from gemoe_ds.analysis.report import PLUS_MINUS, how_it_was_run, main_table
from gemoe_ds.analysis.results import Group, Row
from gemoe_ds.analysis.tables import markdown


def render_comparison(comparison: Comparison) -> str:
    """The report; figures are named as files in `figures/`."""
    results = comparison.results
    base = results.baseline
    trained = [base, *comparison.methods]
    parts = [
        "# Methods compared",
        *verdicts(comparison),
        "## Methods (the paper's Table 1)",
        markdown(main_table(results, trained)),
        f"All rows but {base.label} are trained on the same samples in the same number of steps, "
        "their gates with one learning rate (what a method has beside its gate: see the grid); "
        "accuracies are percent, *Average* is the mean over kinds. *Mean k* counts real experts "
        "only. Rows in bold choose k token by token.",
        "## Static k (Table 2)",
        markdown(main_table(results, comparison.static)),
    ]
    if comparison.of(*ABLATIONS[1:]):
        parts += ["## Ablations (Table 5)", markdown(_ablations(comparison))]
    if comparison.budgets or comparison.budgeted:
        parts += [
            "## GeMoE at other budgets",
            markdown(_budgets(comparison)),
            "*After training*: one trained model, whose k is moved until its mean is the budget; "
            "*in training*: a model of its own for each budget (`budget_k`).",
        ]
    for entry in results.meta.figures:
        parts += [f"![{entry.file.split('.')[0]}](figures/{entry.file})", f"*{entry.caption}*"]
    parts += ["## How it was run", how_it_was_run(results)]
    return "\n\n".join(parts) + "\n"


def verdicts(comparison: Comparison) -> list[str]:
    """What the comparison set out to find, and what came out."""
    found = [_best(comparison)] if len(comparison.dynamic) > 1 else []
    order = [comparison.of(name) for name in ("gemoe", "gemoe_mono_0", "gemoe_reversed")]
    if all(order):
        scores = [groups[0].mean(_accuracy) for groups in order]
        is_papers = scores[0] > scores[1] > scores[2]
        found.append(
            (
                "The ablations fall in the paper's order"
                if is_papers
                else "**The ablations do not fall in the paper's order**"
            )
            + ": full, without the monotonic loss, reversed: "
            + ", ".join(f"{_score(g[0])} at {_k(g[0])}" for g in order)
            + "."
        )
    return found


def _best(comparison: Comparison) -> str:
    rivals = comparison.rivals()
    best = rivals[0]
    names = ", ".join(f"{g.label} {_score(g)} at {_k(g)}" for g in rivals)
    if best.method == "gemoe":
        first = (
            "**GeMoE has the best average of the dynamic methods at its mean k or below** "
            f"({names})"
        )
    else:
        first = (
            f"**At GeMoE's mean k or below {best.label} has a better average than GeMoE** ({names})"
        )
    above = [g for g in comparison.dynamic if g not in rivals]
    if above:
        first += "; with more experts: " + ", ".join(
            f"{g.label} {_score(g)} at {_k(g)}" for g in above
        )
    return first + "."


def _ablations(comparison: Comparison) -> list[list[str]]:
    table = [["Monotonic loss", "Correlation", "Mean k", "Average", "Spearman, worst layer"]]
    for method in ABLATIONS:
        for group in comparison.of(method):
            weight = method.removeprefix("gemoe_mono_").replace("_", ".")
            is_reversed = method == "gemoe_reversed"
            cells = [weight if "mono" in method else "1", "negative" if is_reversed else "positive"]
            table.append([*cells, _k(group), _score(group), _spearman(group)])
    return table


def _spearman(group: Group) -> str:
    worst = [
        min((rho for rho in row.spearman_per_layer if rho is not None), key=abs, default=None)
        for row in group.rows
    ]
    found = [rho for rho in worst if rho is not None]
    return f"{sum(found) / len(found):.3f}" if found else "-"


def _budgets(comparison: Comparison) -> list[list[str]]:
    met = [("after training", g.rows[0].budget_k or 0.0, g) for g in comparison.budget_groups]
    met += [("in training", budget, group) for budget, group in comparison.budgeted]
    table = [["Budget", "Met", "Mean k", "Off by %", "Average", "Retention %"]]
    for when, budget, group in met:
        off = 100 * abs(group.mean(_mean_k) / budget - 1)
        retention = f"{group.mean(lambda r: r.retention):.2f}"
        table.append([f"{budget:g}", when, _k(group), f"{off:.1f}", _score(group), retention])
    return table


def _score(group: Group) -> str:
    sd = group.sd(_accuracy)
    spread = "" if sd is None else f" {PLUS_MINUS} {100 * sd:.2f}"
    return f"{100 * group.mean(_accuracy):.2f}{spread}"


def _k(group: Group) -> str:
    return f"{group.mean(_mean_k):.2f}"


def _accuracy(row: Row) -> float:
    return row.accuracy


def _mean_k(row: Row) -> float:
    return row.mean_k
