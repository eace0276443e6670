"""The contest as Markdown: verdict, accuracies and differences at each mean k, rules, trials."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from experiments.compare.answers import Contest
from experiments.compare.grid import UNTOUCHED, Row, Size
from experiments.compare.standings import AT, SPARSITIES, Standings
from experiments.compare.verdict import interval, verdict
from gemoe_ds.analysis.paired import Estimate
from gemoe_ds.analysis.tables import markdown

_NAMED = 5  # runs that are missing


def render(
    contest: Contest, main: Standings, others: Sequence[Standings], figures: dict[str, str]
) -> str:
    """`figures`: captions by file in `figures/`."""
    grid = contest.grid
    parts = ["# How to spend fewer experts: the methods compared"]
    if contest.is_quick:
        parts.append(_quick(contest))
    parts += [f"* {sentence}" for sentence in verdict(grid, main, others)]
    parts.append("## The same mean k")
    parts.append(_explained(contest))
    parts += [_accuracies(contest, main), "### Difference to " + grid.rows[grid.ours].label]
    parts.append(_differences(contest, main, "to_ours"))
    parts += ["### Difference to " + grid.rows[grid.reference].label]
    parts.append(_differences(contest, main, "to_reference"))
    parts += [f"![{name}](figures/{name}.png)\n\n*{text}*" for name, text in figures.items()]
    parts += ["## Fewer experts, and what is kept", _retention(contest, main)]
    for other in others:
        title = "Trained on captions only" if other.training == "captions" else other.backbone
        ours = f"Difference to {grid.rows[grid.ours].label}:"
        parts += [f"## {title}", _accuracies(contest, other), ours]
        parts.append(_differences(contest, other, "to_ours"))
    parts += ["## Rules", _rules(contest), "## Trials", *_trials(contest), "## Run", _run(contest)]
    return "\n\n".join(parts).replace("\n\n* ", "\n* ").replace("\n* ", "\n\n* ", 1) + "\n"


def _quick(contest: Contest) -> str:
    size = contest.grid.quick
    return (
        f"**A quick contest**: {size.steps} steps of training (the whole one: "
        f"{contest.grid.full.steps}), router seeds {_listed(size.seeds)}, fewer values of each "
        f"knob, {size.samples or 'all'} samples of the {size.split} split. Its figures say less."
    )


def _explained(contest: Contest) -> str:
    seeds = sorted({m.seed for m in contest.measured if m.seed is not None})
    return (
        "Accuracy in percent (mean over kinds of questions) at the same mean number of experts a "
        f"token, on the {_size(contest).split} split, and its 95 % interval over pictures and "
        f"router seeds ({_listed(seeds)}). A row is a curve of points; between two "
        "points of a seed its answers are interpolated, question by question, and nothing is "
        "extrapolated. *: the interval of the difference leaves out 0. No correction is made for "
        "the number of comparisons: one of 20 intervals misses."
    )


def _accuracies(contest: Contest, found: Standings) -> str:
    ks = _ks(found)
    table = [["Method", "Trained", *(f"k {k:g}" for k in ks)]]
    for name in found.rows():
        row = contest.grid.rows[name]
        cells = []
        for k in ks:
            standing = found.get(name, k)
            cells.append(
                interval(standing.accuracy, sign=False)
                if standing
                else _why(found.reasons.get((name, k), ""))
            )
        table.append([_label(contest, name), _trained(row), *cells])
    return markdown(table)


def _differences(contest: Contest, found: Standings, to: str) -> str:
    ks = _ks(found)
    table = [["Method", *(f"k {k:g}" for k in ks)]]
    for name in found.rows():
        cells = [_starred(getattr(found.get(name, k), to, None)) for k in ks]
        if any(cell != "-" for cell in cells):
            table.append([_label(contest, name), *cells])
    return markdown(table) if len(table) > 1 else "No row has points at the same mean k."


def _starred(difference: Estimate | None) -> str:
    if difference is None:
        return "-"
    return interval(difference) + ("*" if difference.is_significant else "")


def _why(reason: str) -> str:
    """`no points on both sides of mean k 3: from 4.1 to 6.2` -> `only 4.1 to 6.2`"""
    reach = reason.rpartition(": from ")[2]
    return f"- (has {reach})" if reach else "-"


def _retention(contest: Contest, main: Standings) -> str:
    table = [["Method", *(f"{100 * sparsity:g} % fewer" for sparsity in SPARSITIES)]]
    for name in main.rows():
        shares = [main.retention.get((name, sparsity)) for sparsity in SPARSITIES]
        if any(shares):
            cells = [interval(share, sign=False) if share else "-" for share in shares]
            table.append([_label(contest, name), *cells])
    if len(table) == 1:
        return f"{contest.grid.control} is not among the runs that are done."
    return markdown(table) + f"\n\nPercent of the accuracy of {contest.grid.control}, tuned alike."


def _rules(contest: Contest) -> str:
    grid = contest.grid
    size = _size(contest)
    source = "training" if size.split == "validation" else "validation"
    return "\n".join(
        [
            f"* All rows start from the same weights, see the same samples in the same order for a "
            f"seed, and train {size.steps} steps of {grid.recipe}.",
            "* What sets a row's mean k is its knob, trained once for each value, or its dial, one "
            f"training for the whole curve; a dial is set on {size.calibration_samples} samples of "
            f"the {source} split, to {_listed(size.budgets)}.",
            f"* Settings are chosen on the validation split: {grid.trials_each} trials for every "
            "row that trains, anew for captions. A trial is as good as its accuracy is above that "
            "of the untouched model with static k, at the mean k that it came out with.",
            *(
                f"* {grid.rows[name].label} had more than its trials: {text}."
                for name, text in grid.development.items()
            ),
            "* The test split is read by the whole contest alone, never by trials or a quick one.",
            "* A straight line between two points of a bent curve lies below it: rows whose points "
            "are far apart lose a little by it. Dials are set to the compared mean k themselves.",
            "* Intervals resample pictures, with all questions of each, in the same way for all "
            "rows. Router seeds enter by Student's t (three are too few to resample).",
        ]
    )


def _size(contest: Contest) -> Size:
    return contest.grid.quick if contest.is_quick else contest.grid.full


def _trials(contest: Contest) -> Iterator[str]:
    ran = {m.row for m in contest.measured}
    rows = [name for name, row in contest.grid.rows.items() if row.trains and name in ran]
    sets = list(dict.fromkeys(m.training for m in contest.measured))
    wanted = [f"{name} {training}" for training in sets for name in rows]
    if missing := [key for key in wanted if key not in contest.tried]:
        yield f"**No trials were run for {_listed(missing)}**: the first setting of each was taken."
    if not contest.tried:
        return
    table = [["Method", "Training", "Setting", "Mean k", "Validation", "Above static k", "Taken"]]
    for key, tried in contest.tried.items():
        name, training = key.split()
        for number, trial in enumerate(tried.trials):
            setting = ", ".join(f"{key}={value}" for key, value in trial.setting.items())
            table.append(
                [
                    contest.grid.rows[name].label,
                    training,
                    f"`{setting or 'as the recipe'}`",
                    f"{trial.mean_k:.2f}",
                    f"{100 * trial.accuracy:.2f}",
                    f"{100 * trial.above_static:+.2f}",
                    "yes" if number == tried.taken else "-",
                ]
            )
    yield markdown(table)


def _run(contest: Contest) -> str:
    measured = contest.measured
    spent = sum(m.seconds for m in measured)
    trained = {(m.row, str(m.value), m.backbone, m.training, m.seed): m for m in measured}
    spent += sum(m.train_seconds or 0 for m in trained.values())
    lines = [
        f"* Command: `{contest.command}`",
        f"* Machine: {'; '.join(dict.fromkeys(m.machine for m in measured))}",
        f"* Commit: {', '.join(dict.fromkeys(m.commit or 'unknown' for m in measured))}",
        f"* {len(measured)} evaluations, {spent / 3600:.1f} hours of one core; "
        f"{min(m.date for m in measured)} to {max(m.date for m in measured)}",
    ]
    if contest.missing:
        names = contest.missing[:_NAMED]
        more = ", ..." * (len(contest.missing) > _NAMED)
        lines.append(f"* **{len(contest.missing)} runs are missing**: {_listed(names)}{more}")
    return "\n".join(lines)


def _label(contest: Contest, name: str) -> str:
    label = contest.grid.rows[name].label
    return f"**{label}**" if name == contest.grid.ours else label


def _trained(row: Row) -> str:
    if row.gates == UNTOUCHED:
        return "nothing"
    if row.gates:
        return f"gates of {row.gates}"
    return f"for each {row.option}" if row.knob else "once"


def _ks(found: Standings) -> list[float]:
    return sorted({k for _, k in [*found.at, *found.reasons]}) or list(AT)


def _listed(values: Sequence[object]) -> str:
    return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
