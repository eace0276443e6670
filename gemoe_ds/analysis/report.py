"""results.json -> report.md and the terminal's table; both say nothing that is not in there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gemoe_ds.analysis.ablation import in_words, layer_table, predictor_table
from gemoe_ds.analysis.gains import MEASURES, gain_table
from gemoe_ds.analysis.results import BASELINE, Group, Results, Row
from gemoe_ds.analysis.tables import aligned, markdown

NONE, PLUS_MINUS = "-", "\N{PLUS-MINUS SIGN}"


@dataclass(frozen=True)
class Column:
    """One column of the main table: heading, value of a row, decimals."""

    heading: str
    value: Callable[[Row], float]
    decimals: int


def _columns(results: Results) -> list[Column]:
    kinds = [Column(kind, _accuracy(kind), 1) for kind in results.kinds]
    most = max(row.activated_parameters for row in results.rows)
    return kinds + [
        Column("Average", lambda row: 100 * row.accuracy, 2),
        Column("Questions", lambda row: 100 * row.accuracy_micro, 2),
        Column("Mean k", lambda row: row.mean_k, 2),
        Column("Activated M", lambda row: row.activated_parameters / 1e6, 3 if most < 1e7 else 1),
        Column("Retention %", lambda row: row.retention, 2),
        Column("Sparsity %", lambda row: row.sparsity, 1),
    ]


def terminal_table(results: Results, width: int | None = None) -> str:
    """The main table as aligned text; without the kinds where it would be wider than `width`."""
    table = main_table(results, for_terminal=True)
    if width is not None and max(map(len, aligned(table))) > width:
        kept = [0, *range(1 + len(results.kinds), len(table[0]))]
        table = [[line[column] for column in kept] for line in table]
    lines = aligned(table)
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def render_report(results: Results) -> str:
    """The Markdown report; figures are named as files in `figures/`."""
    parts = [
        "# Results",
        *_headline(results),
        "## Accuracy and experts",
        markdown(main_table(results)),
        _legend(results),
    ]
    for group in results.adaptive:
        parts += [f"## {group.label}, layer by layer", _layers(group, results), _modalities(group)]
    parts += [*_token_kinds(results), *_gains(results), *_ablations(results)]
    if results.meta.figures:
        parts.append("## Figures")
        for entry in results.meta.figures:
            name = entry.file.rsplit(".", 1)[0].replace("_", " ")
            parts += [f"![{name}](figures/{entry.file})", f"*{entry.caption}*"]
    parts += ["## How it was run", how_it_was_run(results), markdown(_runs(results))]
    return "\n\n".join(part for part in parts if part) + "\n"


def main_table(results: Results, *, for_terminal: bool = False) -> list[list[str]]:
    """A row for each group."""
    columns = _columns(results)
    table = [["Method", *(column.heading for column in columns)]]
    for group in results.groups:
        seeds = f" ({len(group.rows)} seeds)" if len(group.rows) > 1 else ""
        cells = [_number(group, c.value, c.decimals) for c in columns]
        if for_terminal:  # which may not know the sign
            cells = [cell.replace(PLUS_MINUS, "+-") for cell in cells]
        is_bold = group.is_adaptive and not for_terminal
        label = f"**{group.label}**" if is_bold else group.label
        table.append([label + seeds, *cells])
    return table


def _number(group: Group, value: Callable[[Row], float | None], decimals: int) -> str:
    """Mean over seeds, with the standard deviation if there are several."""
    if not group.values(value):
        return NONE
    sd = group.sd(value)
    spread = "" if sd is None else f" {PLUS_MINUS} {sd:.{decimals}f}"
    return f"{group.mean(value):z.{decimals}f}{spread}"


def _headline(results: Results) -> list[str]:
    base = results.baseline
    if not results.adaptive:
        return [
            f"{base.label} answers {100 * base.mean(lambda r: r.accuracy):.2f} % of the questions; "
            "no method that picks k for every token was evaluated."
        ]
    parts = []
    for group in results.adaptive:
        accuracy = 100 * group.mean(lambda r: r.accuracy)
        mean_k = group.mean(lambda r: r.mean_k)
        seeds = f" (mean of {len(group.rows)} seeds)" if len(group.rows) > 1 else ""
        parts.append(
            f"**{group.label} keeps {group.mean(lambda r: r.retention):.2f} % of {base.label}'s "
            f"accuracy at {group.mean(lambda r: r.sparsity):.1f} % expert sparsity{seeds}; "
            f"{_correlation(group)}** It answers {accuracy:.2f} % right with {mean_k:.2f} experts "
            f"a token, {base.label} {100 * base.mean(lambda r: r.accuracy):.2f} % with "
            f"{base.mean(lambda r: r.mean_k):.2f}.{_fair_control(results, group)}"
        )
    return parts


def _correlation(group: Group) -> str:
    """The smallest Spearman over layers and seeds, or where it is not defined."""
    name = "Spearman's correlation of gating entropy and k"
    values = [value for row in group.rows for value in row.spearman_per_layer]
    defined = [value for value in values if value is not None]
    if not defined:
        return f"{name} is undefined, because k is constant in every MoE layer."
    least = math.floor(1000 * min(defined)) / 1000  # "at least" must not round up
    says = f"{name} is at least {least:.3f} in every MoE layer"
    if len(defined) == len(values):
        return says + "."
    layers = zip(*(row.spearman_per_layer for row in group.rows), strict=True)
    constant = [str(layer) for layer, rhos in enumerate(layers, 1) if None in rhos]
    return f"{says} but {', '.join(constant)}, where k is constant."


def _fair_control(results: Results, group: Group) -> str:
    """The tuned fixed k that is nearest in experts, and how far it is from `group`."""
    tuned = [g for g in results.groups if g.method == f"{BASELINE}_tuned"]
    if not tuned:
        return ""
    mean_k = group.mean(lambda r: r.mean_k)
    near = min(tuned, key=lambda g: abs((g.k or 0) - mean_k))
    accuracy = 100 * near.mean(lambda r: r.accuracy)
    gap = accuracy - 100 * group.mean(lambda r: r.accuracy)
    if f"{abs(gap):.2f}" == "0.00":
        return f" {near.label}, reaches {accuracy:.2f} %, the same."
    side = "more" if gap > 0 else "less"
    return f" {near.label}, reaches {accuracy:.2f} %, {abs(gap):.2f} points {side}."


def _legend(results: Results) -> str:
    questions = results.rows[0].num_questions_by_kind
    listed = ", ".join(f"{kind} {questions[kind]:,}" for kind in results.kinds)
    base = results.baseline
    totals = sorted({row.total_parameters for row in results.rows})
    total = " to ".join(f"{t / 1e6:.3f}" for t in dict.fromkeys([totals[0], totals[-1]]))
    lines = [
        f"- Accuracy in percent: exact match on {sum(questions.values()):,} questions "
        f"({listed}); *Average* is the mean over kinds, *Questions* over all questions.",
        f"- *Retention*: average accuracy in percent of {base.label}'s. *Sparsity*: "
        f"100 x (1 - mean k / {results.meta.backbone_k}).",
        f"- *Mean k*: experts a token, over all MoE layers and tokens. *Activated M*: million "
        f"parameters that an average token uses, of {total} million.",
    ]
    lines += _not_asked(results.rows[0])
    if any(group.method == f"{BASELINE}_tuned" for group in results.groups):
        lines.append(
            "- *Tuned*: the routers were trained further, with that k; the other rows with a fixed "
            "k are the pretrained model as it is."
        )
    if any(len(group.rows) > 1 for group in results.groups):
        lines.append(f"- {PLUS_MINUS}: sample standard deviation over seeds.")
    return "\n".join(lines)


def _not_asked(row: Row) -> list[str]:
    if not row.num_not_asked:
        return []
    by_kind = sorted(row.num_not_asked_by_kind.items())
    listed = ", ".join(f"{kind} {number:,}" for kind, number in by_kind)
    return [
        f"- {row.num_not_asked:,} further questions ({listed}) were not asked and count nowhere: "
        f"`data.max_length` cuts {row.num_cut_answers:,} answers, and "
        f"{row.num_not_asked - row.num_cut_answers:,} questions are of {len(row.left_out):,} "
        "samples that cannot be used."
    ]


def _layers(group: Group, results: Results) -> str:
    base = results.baseline
    table = [
        [
            "MoE layer",
            "Mean k",
            "Sparsity %",
            "Entropy, bits",
            "Spearman(entropy, k)",
            "Load, max / mean",
            "Idle experts",
            f"{base.label}: load, max / mean",
            f"{base.label}: idle experts",
        ]
    ]
    for layer in range(group.rows[0].num_layers):
        columns: list[tuple[Group, Callable[[Row], float | None], int]] = [
            (group, _of_layer(layer, "mean_k"), 2),
            (group, _sparsity_of(layer), 1),
            (group, _of_layer(layer, "entropy"), 2),
            (group, _of_layer(layer, "spearman"), 3),
            (group, _of_layer(layer, "load_max_over_mean"), 2),
            (group, _of_layer(layer, "idle_experts"), 0),
            (base, _of_layer(layer, "load_max_over_mean"), 2),
            (base, _of_layer(layer, "idle_experts"), 0),
        ]
        cells = [_number(g, value, d) for g, value, d in columns]
        table.append([str(layer + 1), *cells])
    return markdown(table)


def _accuracy(kind: str) -> Callable[[Row], float]:
    return lambda row: 100 * row.accuracy_by_kind[kind]


def _of_layer(layer: int, name: str) -> Callable[[Row], float | None]:
    return lambda row: getattr(row, f"{name}_per_layer")[layer]


def _sparsity_of(layer: int) -> Callable[[Row], float]:
    return lambda row: _sparsity(row.mean_k_per_layer[layer], row)


def _sparsity(mean_k: float, row: Row) -> float:
    return 100 * (1 - mean_k / row.backbone_k)


def _modalities(group: Group) -> str:
    said = []
    for name, value in (
        ("image", lambda r: r.mean_k_vision),
        ("text", lambda r: r.mean_k_text),
    ):
        if group.values(value):
            said.append(f"{name} tokens {_number(group, value, 2)}")
    experts = group.rows[0].num_experts
    return f"Experts a token, of {experts}: {', '.join(said)}." if said else ""


def _token_kinds(results: Results) -> list[str]:
    """Where the experts go. Methods whose k is constant would all say the same."""
    groups = [group for group in results.adaptive if group.token_kinds]
    if not groups:
        return []
    counts = groups[0].rows[0].num_tokens_by_kind
    kinds = groups[0].token_kinds
    places = range(len(groups[0].rows[0].mean_k_in_answer))[:3]
    table = [["Mean k of", *kinds, *(f"answer token {place + 1}" for place in places)]]
    for group in groups:
        cells = [_number(group, _of_token_kind(kind), 2) for kind in kinds]
        cells += [_number(group, _in_answer(place), 2) for place in places]
        table.append([group.label, *cells])
    listed = ", ".join(f"{counts[kind]:,} {kind}" for kind in kinds)
    return [
        "## Where the experts go",
        markdown(table),
        f"Experts a token, over all MoE layers. Tokens: {listed}. *special*: of the tokenizer; "
        "*question*: also the text of the chat's template. A token is routed to predict the one "
        "that follows it.",
    ]


def _of_token_kind(kind: str) -> Callable[[Row], float | None]:
    def mean(row: Row) -> float | None:
        layers = row.mean_k_by_token_kind.get(kind, ())
        return sum(layers) / len(layers) if layers else None

    return mean


def _in_answer(place: int) -> Callable[[Row], float | None]:
    return lambda row: row.mean_k_in_answer[place] if place < len(row.mean_k_in_answer) else None


def _gains(results: Results) -> list[str]:
    if not results.gains:
        return []
    parts = [
        "## What more experts bring",
        "Points of accuracy, over all questions, that static routing gains from fewer to more "
        "experts. Samples are sorted, and parted into groups of equally many; columns are the "
        "groups' mean values (the paper's Fig. 3). In brackets: 95 %, over samples.",
    ]
    for by, name in MEASURES.items():
        title = name.format(k=results.meta.backbone_k)
        parts += [f"By the {title} of a sample:", markdown(gain_table(results.gains, by))]
    return parts


def _ablations(results: Results) -> list[str]:
    parts = [
        "## What a dropped expert costs",
        "Which number of a token and its expert says what the loss would be without it? A rule "
        "that leaves out the pairs with the smallest of a number is as good as that number ranks "
        "their |cost|: one expert moves the loss up or down, and the more it moves it, the more "
        "is at stake. *Lower half*: the half of all pairs that the rule would leave out first. "
        "95 % intervals are over samples. docs/analysis.md says more.",
    ]
    for found in results.ablations:
        parts += [
            f"### {results.label(found.method, found.k)}, seed {found.seed}",
            in_words(found),
            markdown(predictor_table(found)),
            "Layer by layer: mean costs, and Spearman's correlation of |cost| with each number.",
            markdown(layer_table(found)),
        ]
    return parts if results.ablations else []


def how_it_was_run(results: Results) -> str:
    meta = results.meta
    evaluating = sum(row.seconds for row in results.rows)
    training = sum(row.train_seconds or 0 for row in results.rows)
    parts = ([f"router training {_duration(training)}"] if training else []) + [
        f"evaluation {_duration(evaluating)}"
    ]
    commits = meta.commit or "unknown (not a git checkout)"
    return "\n".join(
        [
            f"- Command: `{meta.command}`",
            f"- Commit: {commits}",
            f"- Machine: {meta.machine}",
            f"- Date: {meta.date}",
            f"- Time: {_duration(meta.seconds)} (of it {', '.join(parts)})",
        ]
    )


def _runs(results: Results) -> list[list[str]]:
    table = [["Row", "Seed", "Training s", "Evaluation s", "Tokens/s", "Command"]]
    for group in results.groups:
        for row in group.rows:
            training = NONE if row.train_seconds is None else f"{row.train_seconds:.0f}"
            speed = f"{row.tokens / row.seconds:,.0f}" if row.seconds else NONE
            cells = [group.label, str(row.seed), training, f"{row.seconds:.1f}", speed]
            table.append([*cells, f"`{row.command}`"])
    return table


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
