"""What the contest has found, in sentences that follow from its figures, whoever wins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from experiments.compare.grid import UNTOUCHED, Grid
from experiments.compare.standings import AT, SPARSITIES, Standings
from gemoe_ds.analysis.paired import Estimate

Differences = dict[tuple[str, float], Estimate]  # by row and mean k


def verdict(grid: Grid, main: Standings, others: Sequence[Standings]) -> list[str]:
    """On the first backbone, then whether the others (and captions) agree."""
    said = [_best(grid, main), _above_ours(grid, main), *_below_ours(grid, main)]
    said += [*_reference(grid, main), *_kept(grid, main)]
    said += [_signs(grid, main, other) for other in others if other.training == main.training]
    said += [_captions(grid, other) for other in others if other.training != main.training]
    return [sentence for sentence in said if sentence]


def interval(estimate: Estimate, sign: bool = True) -> str:
    """A figure in percent or points, and its 95 % interval."""
    form = "{:+.2f}" if sign else "{:.2f}"
    value, low, high = (
        form.format(100 * x + 0.0) for x in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"


def _best(grid: Grid, main: Standings) -> str:
    parts = []
    for k in AT:
        here = {row: main.at[row, k] for row in main.rows() if (row, k) in main.at}
        if here:
            best = max(here, key=lambda row: here[row].accuracy.value)
            score = 100 * here[best].accuracy.value
            parts.append(f"{grid.rows[best].label} {score:.2f} % at k {k:g}")
    return f"The best figures: {', '.join(parts)}." if parts else ""


def _above_ours(grid: Grid, main: Standings) -> str:
    """Who is significantly better than ours."""
    label = grid.rows[grid.ours].label
    lost = [k for k in AT if (grid.ours, k) not in main.at]
    if len(lost) == len(AT):
        return f"**{label} has no figure at any mean k from {AT[0]:g} to {AT[-1]:g}.**"
    unknown = ""
    if lost:
        unknown = f" It has no figure at k {_ks(lost)}, so nothing is said about it there."
    better = _grouped(grid, _to_ours(main), wanted=1)
    if better:
        return f"**Significantly better than {label}: {better}.**{unknown}"
    count = len(_to_ours(main))
    there = _ks([k for k in AT if k not in lost])
    return (
        f"**No row is significantly better than {label} at k {there}** "
        f"({count} comparisons, each with its own 95 % interval).{unknown}"
    )


def _below_ours(grid: Grid, main: Standings) -> Iterable[str]:
    """Whom ours is significantly better than, and whom it cannot be told from."""
    label, found = grid.rows[grid.ours].label, _to_ours(main)
    if not found:
        return
    worse = _grouped(grid, found, wanted=-1)
    yield (
        f"{label} is significantly better than {worse}."
        if worse
        else f"**{label} is significantly better than no other row.**"
    )
    if equal := _grouped(grid, found, wanted=0):
        yield f"No significant difference from {label}: {equal}."


def _reference(grid: Grid, main: Standings) -> Iterable[str]:
    """The reference beside what nobody has trained."""
    free = {row for row in grid.rows if grid.rows[row].gates == UNTOUCHED}
    label, found = grid.rows[grid.reference].label, _to_reference(main)
    found = {key: difference for key, difference in found.items() if key[0] in free}
    if not found:
        return
    if better := _grouped(grid, found, wanted=1):
        yield f"**Without any training significantly better than {label}: {better}.**"
    else:
        yield f"No row without training is significantly better than {label}."


def _kept(grid: Grid, main: Standings) -> Iterable[str]:
    kept = [
        (sparsity, main.retention[grid.ours, sparsity])
        for sparsity in SPARSITIES
        if (grid.ours, sparsity) in main.retention
    ]
    if kept:
        shares = ", ".join(
            f"{interval(share, sign=False)} % at {100 * sparsity:g} % fewer experts"
            for sparsity, share in kept
        )
        control = _control(grid)
        yield f"Of the accuracy of {control} {grid.rows[grid.ours].label} keeps {shares}."


def _signs(grid: Grid, main: Standings, other: Standings) -> str:
    """Whether the sign of every significant difference to ours is the same on another backbone."""
    here, there = _to_ours(main), _to_ours(other)
    clear = {key: d for key, d in here.items() if d.is_significant and key in there}
    if not clear:
        return ""
    label = grid.rows[grid.ours].label
    turned = {key: there[key] for key, d in clear.items() if d.value * there[key].value <= 0}
    sentence = (
        f"On backbone {other.backbone} {len(clear) - len(turned)} of the {len(clear)} significant "
        f"differences to {label} have the same sign"
    )
    if turned:
        names = "; ".join(
            f"{grid.rows[row].label} at k {k:g} ({interval(d)} there)"
            for (row, k), d in turned.items()
        )
        sentence += f"; **another sign: {names}**"
    better = _grouped(grid, there, wanted=1)
    return f"{sentence}; significantly better than {label} there: {better or 'no row'}."


def _captions(grid: Grid, found: Standings) -> str:
    """Ours, trained on captions, beside the best row without training at the same mean k."""
    parts = []
    for k in sorted({k for _, k in found.at}):
        free = [
            row
            for row in grid.rows
            if grid.rows[row].gates == UNTOUCHED and found.get(row, k) and row != grid.ours
        ]
        if not free or not found.get(grid.ours, k):
            continue
        best = max(free, key=lambda row: found.at[row, k].accuracy.value)
        difference = found.at[best, k].to_ours
        assert difference is not None
        ours = Estimate(-difference.value, -difference.high, -difference.low, difference.seeds)
        parts.append(f"{interval(ours)} points at k {k:g} ({grid.rows[best].label})")
    label = grid.rows[grid.ours].label
    if not parts:
        return ""
    first = f"Trained on captions only, {label} minus the best row without training"
    return f"{first}: {'; '.join(parts)}."


def _control(grid: Grid) -> str:
    name, value = grid.training_of(grid.control)
    return f"{grid.rows[name].label} (k {value})"


def _to_ours(found: Standings) -> Differences:
    """Above 0 where the row is better."""
    return {key: s.to_ours for key, s in found.at.items() if s.to_ours}


def _to_reference(found: Standings) -> Differences:
    return {key: s.to_reference for key, s in found.at.items() if s.to_reference}


def _grouped(grid: Grid, found: Differences, wanted: int) -> str:
    """Rows that are significantly above (1) or below (-1), or neither (0), and at which k."""
    rows: dict[str, list[str]] = {}
    for (row, k), difference in found.items():
        sign = 0 if not difference.is_significant else (1 if difference.value > 0 else -1)
        if sign == wanted:
            by = f" ({interval(difference)})" if wanted == 1 else ""
            rows.setdefault(row, []).append(f"{k:g}{by}")
    return "; ".join(f"{grid.rows[row].label} at k {', '.join(ks)}" for row, ks in rows.items())


def _ks(ks: Sequence[float]) -> str:
    return ", ".join(f"{k:g}" for k in ks)
