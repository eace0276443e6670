"""Data on the way to a step, and the answers to benchmarks."""

from __future__ import annotations

from functools import partial

from experiments.release.claim import ByHand, Claim
from experiments.release.results import Results, Row

DATA = "docs/data.md"
BENCHMARKS = "docs/benchmarks.md"
COST = "data_cpu.json"
ANSWERS = "answers_cpu.json"
TITLES = {
    "olmoe": "OLMoE, text",
    "molmoe": "MolmoE",
    "deepseek_vl2": "DeepSeek-VL2",
    "qwen3_vl_moe": "Qwen3-VL",
    "moe_llava_qwen": "MoE-LLaVA",
}


def _rows_a_second(results: Results, layout: str) -> int:
    found: int = results.row(COST, "conversion", what=layout)["rows_a_second"]
    return found


def _kb(number_of_bytes: float) -> str:
    return f"{number_of_bytes / 1e3:.0f} KB"


def _pictures(results: Results) -> str:
    size = results.json(COST)["conversion"][0]["bytes_a_picture"]
    (others,) = {round(_rows_a_second(results, name), -1) for name in ("parquet", "webdataset")}
    return (
        f"| conversion, pictures of {_kb(size)} | {_rows_a_second(results, 'llava json')} rows a "
        f"second and core from LLaVA's JSON, {others} from parquet or tars; {_decoding(results)}"
    )


def _decoding(results: Results) -> str:
    shares = [
        row["of_decoding"] for row in results.rows(COST, "conversion") if "of_decoding" in row
    ]
    words = {0.5: "half", 0.67: "two thirds"}
    low, high = (
        words[min(words, key=lambda known: abs(known - share))]
        for share in (min(shares), max(shares))
    )
    return f"{low} to {high} of it is decoding"


def _text(results: Results) -> str:
    large = results.json(COST)["memory"]
    low, high = sorted((large["rows_a_second"], _rows_a_second(results, "text")))
    return (
        f"| conversion, text | {round(low, -2):,} to {round(high, -2):,} rows a second; "
        f"{large['peak_mb']} MB at most for a JSON list of {large['rows']:,} rows "
        f"({large['json_mb'] / 1e3:.1f} GB) |"
    )


def _cold(results: Results) -> str:
    cold = results.json(COST)["cold"]
    read, wanted = _kb(cold["bytes_read"]), _kb(cold["bytes_of_the_picture"])
    return f"| one sample read at random, nothing kept | {read} for a picture of {wanted} |"


def _reading(results: Results) -> str:
    found = results.json(COST)["feeding"]["reading"]
    return (
        f"| {found['threads']} reader threads, of a disk that takes "
        f"{1000 * found['seconds_a_read']:.0f} ms a read | "
        f"{found['times_one']:.0f} times one thread"
    )


def _backbones(results: Results) -> list[Row]:
    found: list[Row] = results.json(COST)["feeding"]["backbones"]
    return found


def _loading(results: Results) -> str:
    ratios = [row["plain_over_ours_seconds"] for row in _backbones(results)]
    return f"plain / ours {min(ratios):.2f} to {max(ratios):.2f} by backbone: about the same"


def _share(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".removeprefix("0")


def _order_row(results: Results, backbone: str) -> str:
    (row,) = (row for row in _backbones(results) if row["backbone"] == backbone)
    valid = _share(row["valid_grouped"], 3), _share(row["valid_shuffled"], 2)
    busiest = row["busiest_rank_grouped"], row["busiest_rank_shuffled"]
    return f"| {TITLES[backbone]} | {valid[0]} ({valid[1]}) | {busiest[0]:.2f} ({busiest[1]:.2f}) |"


def _drawn(results: Results) -> str:
    return f"drawn from those of {results.json(COST)['feeding']['rows']:,} generated samples"


def _answers_row(results: Results, title: str, task: str) -> str:
    factors = [
        results.row(ANSWERS, task=task, contender=f"gemoe_ds, k {k}")["speed_up"] for k in (8, 4)
    ]
    return f"| {title} | {' | '.join(f'{factor:.2f} x' for factor in factors)} |"


def _answers_conditions(results: Results) -> str:
    (rounds,) = {row["rounds"] for row in results.rows(ANSWERS)}
    found = results.json(ANSWERS)
    threads = {1: "one"}[found["threads"]]
    return f"{found['dtype']}, seconds of {threads} CPU thread, median of {rounds} paired rounds"


CLAIMS = [
    Claim(
        DATA,
        "three to four minutes of one core for 558k samples like those of LLaVA-Pretrain, about "
        "three times that if they have five turns",
        ByHand(
            "not noted; the lengths of generated sets of 8,000 samples, before a run",
            commit="0e400dc",
            date="2026-11-28",
        ),
    ),
    Claim(DATA, _pictures),
    Claim(DATA, _text),
    Claim(DATA, _cold),
    Claim(DATA, _reading),
    Claim(
        DATA,
        "(6.4 times in another run)",
        ByHand(
            "python -m benchmarks.data --parts feeding",
            commit="955bd43",
            date="2026-11-29",
        ),
    ),
    Claim(DATA, _loading),
    *(Claim(DATA, partial(_order_row, backbone=name)) for name in TITLES),
    Claim(DATA, _drawn),
    Claim(
        DATA,
        "With 60,000 different ones of text, micro-batches of 8, the shares are .998 and 1.02.",
        ByHand(
            "not noted; counted as `_valid` of benchmarks/data_feed.py does",
            commit="955bd43",
            date="2026-11-29",
        ),
    ),
    Claim(
        BENCHMARKS,
        "round otherwise, by about 3e-6 a token",
        ByHand(
            "not noted; gemoe benchmark answer on other numbers of ranks that share experts",
            commit="8a94afb",
            date="2026-11-28",
        ),
    ),
    Claim(BENCHMARKS, _answers_conditions),
    Claim(BENCHMARKS, lambda r: _answers_row(r, "MMLU, 5 shots", "mmlu, 5 shots")),
    Claim(BENCHMARKS, lambda r: _answers_row(r, "HellaSwag", "hellaswag")),
    Claim(
        BENCHMARKS,
        lambda r: _answers_row(r, "GSM8K, 5 shots, 32 tokens written", "gsm8k, 5 shots"),
    ),
]

NOT_MEASURED = {
    DATA: [
        # tests/data/test_order.py holds these three
        "more than 97 % of the tokens",
        "less than 85 % without",
        "less than 1.05 times the mean",
        "to 1e-5 in float32",  # tests/models/test_packing.py
        "With 0.5 an epoch takes",
        "`data.prefetch_bytes` (1 GiB)",
        "a share of the data such as 0.01",
    ],
    BENCHMARKS: [
        "at most 5 % of the time",  # by `parts.py`: twenty times the last commit lies between two
        "3 seconds of CPU, 1 GiB of memory",
        "**Intervals** are 95 %",
        "agree to 1e-4 (tests/evaluation/benchmarks/test_stock.py)",
    ],
}
