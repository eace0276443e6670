"""The front page."""

from __future__ import annotations

from experiments.release.claim import ByHand, Claim
from experiments.release.claims.memory import estimated
from experiments.release.results import Results, Row

PAGE = "README.md"
DEMO = "demo/results.json"
CONTEST, MEASURED = "compare/standings.json", "compare/contest.json"


def _better(results: Results) -> str:
    mixed = [one["at"] for one in results.json(CONTEST) if one["training"] == "mixed"]
    clear = {
        name
        for at in mixed
        for name, one in at.items()
        if one["to_ours"] and one["to_ours"]["low"] > 0
    }
    rows = f"{', '.join(sorted(clear))} are" if clear else "No row is"
    return f"{rows} significantly better than `threshold` at a mean k from 3 to 6, on this model or"


def _minus(results: Results, row: str, k: int) -> str:
    """Threshold minus a row of the first model, in points."""
    found = results.json(CONTEST)[0]["at"][f"{row} {k}"]
    return _interval(*(-100 * found["to_ours"][name] for name in ("value", "high", "low")))


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def trained_on_captions(results: Results) -> Row:
    """The standing of the rows that learned from captions alone."""
    (found,) = [one for one in results.json(CONTEST) if one["training"] == "captions"]
    return dict(found)


def _on_captions(results: Results) -> str:
    """Untouched static top-k minus GeMoE, which learned from captions alone."""
    at = trained_on_captions(results)["at"]
    bounds = "value", "low", "high"
    at_3, at_4 = (
        _interval(*(100 * at[f"top_k {k}"]["to_reference"][bound] for bound in bounds))
        for k in (3, 4)
    )
    return f"is below the untouched model's top-k by {at_3} points at k 3 and {at_4} at 4"


def _contest_row(row: str, title: str) -> Claim:
    return Claim(PAGE, lambda r: f"| {title} | {_minus(r, row, 3)} | {_minus(r, row, 4)} |")


def _demo_row(results: Results, method: str, k: float | None, title: str, *more: float) -> str:
    """Accuracy, mean k and share of tuned top-8; a second budget behind a semicolon."""
    tuned = results.row(DEMO, method="top_k_tuned", k=8)["accuracy"]
    key = "k" if method.startswith("top_k") or k is None else "budget_k"
    rows = [results.row(DEMO, method=method, **{key: value}) for value in (k, *more)]
    digits = 0 if method.startswith("top_k") else 2
    cells = (
        "; ".join(f"{100 * row['accuracy']:.1f} %" for row in rows),
        "; ".join(f"{row['mean_k']:.{digits}f}" for row in rows),
        "; ".join(f"{100 * row['accuracy'] / tuned:.1f} %".replace(".0 %", " %") for row in rows),
    )
    return f"| {title} | {' | '.join(cells)} |"


def _demo_questions(results: Results) -> str:
    row = results.json(DEMO)["rows"][0]
    return f"Measured on {sum(row['num_questions_by_kind'].values()):,} test questions"


def _beam(results: Results) -> str:
    """Accuracies at a mean k of 3, by seed."""
    where = {"backbone": "annealed", "training": "mixed", "budget": 3.0}
    beam, ours = (
        [row["accuracy"] for row in results.rows(MEASURED, "measured", row=row, **where)]
        for row in ("beam_dial", "threshold")
    )
    *first, last = [f"{100 * accuracy:.1f}" for accuracy in beam]
    return (
        f"{', '.join(first)} and {last} % at 3; `threshold` {100 * min(ours):.1f} to "
        f"{100 * max(ours):.1f} %"
    )


def _kept(results: Results) -> str:
    (mixed, *_) = results.json(CONTEST)
    share = 100 * mixed["retention"]["threshold 0.55"]["value"]
    return f"keeps {share:.1f} % of tuned top-8 at 55 % fewer experts"


def _saving(results: Results) -> str:
    shares = [
        results.row("bench_cpu.json", suite="layer", layer="gemoe_ds", mean_k=5.1, ep=1, mode=mode)[
            "realised_over_ideal"
        ]
        for mode in ("forward", "frozen")
    ]
    return (
        f"With 5.1 instead of 8 experts a token, {100 * shares[0]:.0f} % of the possible saving is "
        f"realised forward and {100 * shares[1]:.0f} % with the backward pass"
    )


def _answers(results: Results) -> str:
    ours = results.rows("answers_cpu.json", contender="gemoe_ds, k 8")
    factors = [row["speed_up"] for row in ours if not row["task"].startswith("gsm8k")]
    return f"come {min(factors):.1f} to {max(factors):.1f} times as fast on a CPU"


def _flips(results: Results) -> str:
    flipped = [100 * share for share in results.json("k_flips/k_flips.json")["flipped_per_layer"]]
    return f"bfloat16 moves k of {min(flipped):.1f} to {max(flipped):.1f} % of the tokens"


def _few_bits(results: Results) -> str:
    model = results.json("full_size_qwen3_vl_nf4.json")["backbones"]["qwen3_vl_moe"]
    peak = max(
        bytes_
        for phase in (*model["phases"], *model["phases_resumed"])
        for bytes_ in phase["host_bytes"]
    )
    return f"a step took {peak / 2**30:.1f} GiB on a CPU"


def _memory(backbone: str) -> Claim:
    """Of a GPU, for the recipes of one node and of four."""
    return Claim(
        PAGE, lambda r: f"| `{backbone}_gemoe_8_gpus` | {' | '.join(estimated(r, backbone))} |"
    )


def _wheels(results: Results) -> str:
    *first, last = (row["python"] for row in results.rows("wheels.json"))
    return f"installed from nothing and used on Python {', '.join(first)} and {last}."


CLAIMS = [
    Claim(PAGE, _wheels),
    Claim(
        PAGE,
        "make test # everything that CI checks: 8 to 24 minutes on 2 CPU cores",
        ByHand("make test", "16bafe6", "2 CPU cores", "2026-11-30"),
    ),
    Claim(PAGE, lambda r: f"{len(r.json('parity.json')['cases'])} combinations"),
    *(_memory(name) for name in ("olmoe", "molmoe", "deepseek_vl2", "qwen3_vl")),
    Claim(PAGE, _few_bits),
    Claim(PAGE, _answers),
    Claim(PAGE, _demo_questions),
    Claim(PAGE, lambda r: _demo_row(r, "top_k", 8, "top-8, as pretrained")),
    Claim(PAGE, lambda r: _demo_row(r, "top_k_tuned", 8, "top-8, routers tuned")),
    Claim(PAGE, lambda r: _demo_row(r, "top_k", 4, "top-4, as pretrained")),
    Claim(PAGE, lambda r: _demo_row(r, "score", 4.0, "score rule, nothing trained", 3.0)),
    Claim(PAGE, lambda r: _demo_row(r, "gemoe", None, "GeMoE")),
    Claim(PAGE, lambda r: _demo_row(r, "threshold", 4.0, "**threshold**, one training", 3.0)),
    Claim(PAGE, _on_captions),
    Claim(PAGE, _flips),
    Claim(PAGE, _better),
    Claim(PAGE, _kept),
    _contest_row("top_k_tuned", "top-k, tuned for each k"),
    _contest_row("gemoe", "GeMoE"),
    _contest_row("dynmoe", "DynMoE"),
    _contest_row("adamoe", "AdaMoE"),
    _contest_row("zeda", "ZEDA"),
    _contest_row("remoe", "ReMoE"),
    _contest_row("moepp", "MoE++"),
    Claim(PAGE, _beam),
    Claim(PAGE, _saving),
]

NOT_MEASURED = {
    PAGE: [
        "arXiv 2606.26287",
        "Python 3.11 or newer",
        "One GPU of 24 GB",  # its size
    ]
}
