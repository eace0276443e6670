"""bench_DEVICE.json -> the same as a Markdown page and a plot beside it."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.figures import draw_cost, draw_layers
from benchmarks.rows import EXCHANGE, LABELS, MODES, OURS, PARTS, Row, grouped
from gemoe_ds.analysis.tables import markdown
from gemoe_ds.errors import DataError
from gemoe_ds.files import write_text

# Suites with a table of their own.
_APART = ("stages", "timeline", "links", "monotonic", "compile", "quantised")


def write_report(results: Path) -> str:
    """Write the page and the plot beside `results`; gives the page."""
    try:
        data = json.loads(results.read_text(encoding="utf-8"))
        page = render(data, results.with_suffix(".png").name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{results} is no benchmark result: {error!r}; run python -m benchmarks"
        ) from error
    draw_layers(data["rows"], results.with_suffix(".png"))
    if "cost_model" in data:
        draw_cost(data["cost_model"], results.with_name(data["cost_model"]["figure"]))
    write_text(results.with_suffix(".md"), page)
    return page


def _timed(data: Row) -> str:
    if data.get("clock") == "cpu":
        return "times are seconds that one thread computed"
    return f"{data['threads']} threads"


def render(data: Row, figure: str) -> str:
    rows: list[Row] = data["rows"]
    parts = [
        f"# MoE layer, {data['device']}",
        f"{data['machine']}; {_timed(data)}, {data['dtype']}; {data['date']}, commit "
        f"`{data['commit']}`, {data['seconds'] / 60:.0f} min.\n\n    {data['command']}",
        "Medians over rounds in which all contenders of a table took turns, quartiles in brackets. "
        "*Realised / ideal* is (t at the largest k - t) / (t at the largest k x share of experts "
        "saved), *dense rate* the time of one dense product of as many FLOPs over the layer's, "
        "*router* the share of scores, choice, losses and plan; each is a median of paired rounds. "
        "A last column over 1 says by how much gemoe_ds is faster at the same k (for the padded "
        "layer: at the same mean k).",
        *_not_run(data),
        f"![time against mean k]({figure})",
    ]
    timed = [row for row in rows if row["suite"] not in _APART]
    for (suite, shape, tokens, ep), some in grouped(timed).items():
        ranks = f", EP {ep}" if ep > 1 else ""
        parts.append(f"## {suite}: {shape}, {tokens} tokens{' a rank' if ep > 1 else ''}{ranks}")
        for mode, title in MODES.items():
            of_mode = [row for row in some if row["mode"] == mode]
            if of_mode:
                parts += [f"**{title}**", markdown(_table(of_mode)), *_monitoring(of_mode)]
    parts += (
        _monotonic(rows)
        + _compiled(rows)
        + _quantised(rows)
        + _links(rows)
        + _stages(rows)
        + _timeline(rows)
        + _cost(data)
    )
    return "\n\n".join(parts) + "\n"


def _monitoring(rows: list[Row]) -> list[str]:
    """Of whole steps."""
    shares = [row["monitoring_share"] for row in rows if "monitoring_share" in row]
    return [f"Statistics and TensorBoard take {share:.2%} of a step's time." for share in shares]


def _not_run(data: Row) -> list[str]:
    """What this page lacks, and the command that would fill it in."""
    suites = {row["suite"] for row in data["rows"]}
    lacking = []
    if data["device"] == "cpu":
        lacking.append("Not run on a GPU; on a machine with one, `make bench` does so.")
    if "links" not in suites:
        lacking.append("Links of given rates and delays were not run: they need root and iproute2.")
    return [" ".join(lacking)] if lacking else []


def _links(rows: list[Row]) -> list[str]:
    """Two hosts, by the rate of the link between them."""
    every = [row for row in rows if row["suite"] == "links"]
    some = [row for row in every if row["layer"] not in (EXCHANGE, *PARTS)]
    if not some:
        return []
    table = [["link", "mode", "layer", "mean k", "ms", "MB sent", "x gemoe_ds"]]
    for row in some:
        same_link = [r for r in some if (r["link"], r["mode"]) == (row["link"], row["mode"])]
        table.append(
            [
                row["link"],
                row["mode"],
                _label(row),
                f"{row['mean_k']:.2f}",
                f"{row['ms']:.1f}",
                _number(_megabytes_sent(row), "{:.1f}"),
                _number(_against_ours(row, same_link), "{:.2f}"),
            ]
        )
    plain = [["link", "bytes each way", "ms of a plain exchange"]]
    plain += [
        [row["link"], str(row["bytes"]), f"{row['ms']:.2f}"]
        for row in every
        if row["layer"] == EXCHANGE
    ]
    title = f"## Two hosts, links of several rates and delays ({some[0]['tokens']} tokens a rank)"
    return [title, markdown(plain), markdown(table)]


def _monotonic(rows: list[Row]) -> list[str]:
    some = [row for row in rows if row["suite"] == "monotonic"]
    if not some:
        return []
    table = [["tokens", "", "ms", "the loss's time over it"]]
    for row in some:
        name = f"the whole layer, k {row['mean_k']}" if row["layer"] == OURS else row["layer"]
        low, high = row["quartiles_ms"]
        share = _number(row.get("loss_share"), "{:.2%}")
        times = f"{row['ms']:.1f} [{low:.1f}, {high:.1f}]"
        table.append([str(row["tokens"]), name, times, share])
    return ["## The monotonic loss, value and gradient", markdown(table)]


def _compiled(rows: list[Row]) -> list[str]:
    some = [row for row in rows if row["suite"] == "compile"]
    if not some:
        return []
    table = [["", "tokens", "mode", "way", "ms", "over eager", "first call, s"]]
    for row in some:
        low, high = row["quartiles_ms"]
        table.append(
            [
                row["layer"],
                str(row["tokens"]),
                row["mode"],
                row["way"],
                f"{row['ms']:.1f} [{low:.1f}, {high:.1f}]",
                _number(row.get("over_eager"), "{:.3f}"),
                f"{row['first_call_s']:.1f}",
            ]
        )
    return ["## torch.compile, beside eager mode in turn", markdown(table)]


def _quantised(rows: list[Row]) -> list[str]:
    some = [row for row in rows if row["suite"] == "quantised"]
    if not some:
        return []
    head = ["experts in", "MB", "mode", "mean k", "ms", "over the first", "realised / ideal"]
    table = [head]
    for row in some:
        low, high = row["quartiles_ms"]
        table.append(
            [
                row["layer"],
                f"{row['bytes'] / 1e6:.0f}",
                row["mode"],
                f"{row['mean_k']:.1f}",
                f"{row['ms']:.1f} [{low:.1f}, {high:.1f}]",
                f"{row['over_plain']:.3f}",
                _number(row.get("realised_over_ideal"), "{:.3f}"),
            ]
        )
    title = f"## Frozen experts in few bits: {some[0]['shape']}, {some[0]['tokens']} tokens"
    return [title, markdown(table)]


def _stages(rows: list[Row]) -> list[str]:
    some = [row for row in rows if row["suite"] == "stages"]
    if not some:
        return []
    table = [["mean k", "stage", "ms", "share", "MB to move", "moved / minimal", "GB/s"]]
    for row in some:
        must, moved = row["minimal_bytes"], row["moved_bytes"]
        table.append(
            [
                f"{row['mean_k']:.2f}",
                row["layer"],
                f"{row['ms']:.1f}",
                f"{row['share']:.1%}",
                f"{must / 1e6:.0f}" if must else "-",
                f"{moved / must:.2f}" if must else "-",
                f"{moved / row['ms'] / 1e6:.0f}" if must else "-",
            ]
        )
    note = (
        "Self time in a profile of the forward pass of the experts alone. *MB to move*: every "
        "stage reads its input and writes its output once."
    )
    return ["## Where the experts' time goes", note, markdown(table)]


def _timeline(rows: list[Row]) -> list[str]:
    parts = []
    for row in [row for row in rows if row["suite"] == "timeline"]:
        table = [["span", "from, ms", "to, ms", "of which waiting, ms", "elements sent"]]
        for span in row["spans"]:
            waited, elements = span.get("waited_ms"), span.get("elements")
            cells = [_number(waited, "{:.1f}"), _number(elements, "{}")]
            table.append([span["name"], f"{span['start']:.1f}", f"{span['end']:.1f}", *cells])
        note = (
            "One pass on rank 0 under the profiler, with a shared expert twice as wide as a routed "
            "one; the trace beside this file opens in Perfetto. An exchange spans from its start "
            "to the end of the wait for it."
        )
        parts += [f"## Timeline, EP {row['ep']}", note, markdown(table)]
    return parts


def _cost(data: Row) -> list[str]:
    cost = data.get("cost_model")
    if not cost:
        return []
    machine = cost["machine"]
    table = [["EP", "used for", "mode", "tokens", "mean k", "measured ms", "predicted ms", "error"]]
    for row in cost["compared"]:
        numbers = [
            f"{row['mean_k']:.2f}",
            f"{row['measured_ms']:.1f}",
            f"{row['predicted_ms']:.1f}",
        ]
        head = [str(row["ep"]), row["of"], row["mode"], str(row["tokens"])]
        table.append([*head, *numbers, f"{row['error']:+.1%}"])
    projected = [["backbone", "EP", "GPUs", "all experts, ms", "GeMoE, ms", "speed-up"]]
    for row in cost["projected"]:
        if row["gpus"] in (8, 64, 512, 4096):
            times = [f"{row['all_experts_ms']:.1f}", f"{row['gemoe_ms']:.1f}"]
            head = [row["backbone"], str(row["ep"]), str(row["gpus"])]
            projected.append([*head, *times, f"{row['speed_up']:.2f}"])
    gb_per_s = machine["bytes_per_s"] / 1e9
    rate = "bytes too fast to tell" if gb_per_s > 1e3 else f"{gb_per_s:.2f} GB/s of all ranks"
    fitted = (
        "Fitted on EP 1 and 2 of this host, lower quartiles: "
        f"{machine['flops_per_s'] / 1e9:.0f} GFLOP/s, "
        f"{1e9 * machine['fixed_s_per_token']:.0f} ns a token whatever its k, "
        f"{1e6 * machine['alpha_s']:.0f} us a message, {rate}. A slow link is what its plain "
        "exchanges take. What is marked *check* was not used in the fit."
    )
    return [
        "## Cost model",
        fitted,
        markdown(table),
        "### Projected to GPU clusters: an estimate, not a measurement",
        cost["assumptions"],
        markdown(projected),
        "![predicted against measured, and the projection](" + cost["figure"] + ")",
    ]


def _table(rows: list[Row]) -> list[list[str]]:
    head = ["layer", "mean k", "ms", "tokens/s", "GFLOP/s", "realised / ideal", "dense rate"]
    head += ["router", "peak MB", "MB sent", "x gemoe_ds"]
    table = [head]
    for row in rows:
        if row["layer"] in PARTS:
            continue
        low, high = row["quartiles_ms"]
        peak = row.get("peak_bytes")
        table.append(
            [
                _label(row),
                f"{row['mean_k']:.2f}",
                f"{row['ms']:.1f} [{low:.1f}, {high:.1f}]",
                f"{row['tokens_per_s']}",
                f"{row['gflops_per_s']:.0f}",
                _number(row.get("realised_over_ideal"), "{:.3f}"),
                _number(row.get("dense_rate_share"), "{:.0%}"),
                _number(row.get("router_share"), "{:.1%}"),
                _number(peak / 1e6 if peak is not None else None, "{:.0f}"),
                _number(_megabytes_sent(row), "{:.1f}"),
                _number(_against_ours(row, rows), "{:.2f}"),
            ]
        )
    used = [i for i in range(len(head)) if i < 3 or any(line[i] != "-" for line in table[1:])]
    return [[line[i] for i in used] for line in table]


def _label(row: Row) -> str:
    layer: str = row["layer"]
    return LABELS.get(layer, layer)


def _megabytes_sent(row: Row) -> float | None:
    traffic = row.get("traffic")
    return (traffic["row_bytes"] + traffic["metadata_bytes"]) / 1e6 if traffic else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _against_ours(row: Row, rows: list[Row]) -> float | None:
    """Time of a peer over ours at the same mean k."""
    same = [r for r in rows if r["layer"] == OURS and abs(r["mean_k"] - row["mean_k"]) < 0.02]
    if row["layer"] == OURS or not same:
        return None
    ratio: float = row["ms"] / same[0]["ms"]
    return ratio
