"""How much memory a run needs, estimated and measured, and how fast weights are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.release.claim import ByHand, Claim
from experiments.release.results import Results

PAGE = "docs/memory.md"
FULL_SIZE = "full_size.json"
ESTIMATES = "estimates.json"
MODELS = "olmoe", "deepseek_vl2"

_DRY_RUN = "gemoe train RECIPE --dry-run"
_NOV_25 = ByHand(_DRY_RUN, "9b4fcc5", "a CPU", "2026-11-25")
_NOV_28 = ByHand(_DRY_RUN, "2e65d88", "a CPU", "2026-11-28")
_PICTURES = ByHand(_DRY_RUN, "f4be7ba, 2e65d88", "a CPU", "2026-11-28")

TEXT_ONLY = """
| `trainable: routers` | 2.59 / 2.54 | 1.87 / 1.85 |
| a quarter of the tokens | 1.81 / 1.77 | 1.29 / 1.32 |
| four times the tokens | 5.74 / 5.99 | 4.12 / 4.05 to 4.48 |
| `activation_checkpointing` | 2.17 / 2.22 | 1.61 / 1.71 to 1.74 |
| `pack_experts` | 2.59 / 2.52 | 2.45 / 2.28 to 2.30 |
| `trainable: experts` | 6.58 / 6.32 | 6.16 / 6.46 |
| `trainable: all` | 8.18 / 8.07 | 7.96 / 8.14 |
"""
PICTURES = """
| MolmoE | 1.47 / 1.42 | 2.48 / 2.26 | 2.44 / 2.22 |
| DeepSeek-VL2 | 1.75 / 1.76 | 3.66 / 3.34 (micro-batch 1) | 3.58 / 3.38 |
| Qwen3-VL | 1.10 / 1.01 | 1.66 / 1.52 | 1.37 / 1.33 |
| MoE-LLaVA (Qwen) | 1.17 / 1.08 | 1.44 / 1.40 | 1.34 / 1.30 |
| `tiny` | | 1.44 / 1.40 | |
"""
PICTURES_IN_BFLOAT16 = """
| MolmoE 448, 4 | 1.35 / 1.35 |
| MolmoE 336, 2, `activation_checkpointing` | 1.02 / 0.98 |
| DeepSeek-VL2 896, 2, `activation_checkpointing` | 1.52 / 1.51 |
| MoE-LLaVA (Qwen) 672, 3 | 1.00 / 1.04 |
| MoE-LLaVA (Qwen) 448, 2, `trainable: all`, `activation_checkpointing` | 1.30 / 1.34 |
| MoE-LLaVA (StableLM) 896, 4 | 1.05 / 1.10 |
| `tiny` 448, 4, `trainable: all` (no weights to check) | 1.72 / 1.62 |
| `tiny` 896, 4, `trainable: all`, `activation_checkpointing` | 1.45 / 1.39 |
"""


def estimated(results: Results, backbone: str) -> list[str]:
    """GiB of a GPU, for its recipes of one node and of four."""
    recipes = [f"{backbone}_gemoe_{machines}" for machines in ("8_gpus", "4_nodes")]
    return [f"{results.row(ESTIMATES, recipe=recipe)['gib']:.1f}" for recipe in recipes]


def _recipes(backbone: str) -> Claim:
    return Claim(PAGE, lambda r: f"| `{backbone}_gemoe_*` | {' | '.join(estimated(r, backbone))} |")


def _samples(results: Results) -> str:
    seen, read = (
        results.row(ESTIMATES, recipe=f"{name}_gemoe_8_gpus")["sample"]
        for name in ("qwen3_vl", "olmoe")
    )
    width, height = seen["pixels"]
    return (
        f"a picture of {width} x {height} pixels and a text of {seen['text_tokens']} tokens; for "
        f"OLMoE it is a text of {read['text_tokens']:,} tokens"
    )


def _beside(results: Results) -> str:
    (beside,) = {row["beside_gib"] for row in results.rows(ESTIMATES) if row["ranks"] > 1}
    return f"CUDA's context and NCCL's buffers take about {beside:.1f} GiB beside it"


def peak(model: dict[str, Any]) -> int:
    """Bytes of the fullest rank, over loading, training and saving, of the run and the resumed."""
    phases = (*model["phases"], *model["phases_resumed"])
    return max(size for phase in phases for size in phase["host_bytes"])


def _models(results: Results) -> list[dict[str, Any]]:
    backbones = results.json(FULL_SIZE)["backbones"]
    return [backbones[name] for name in MODELS]


def _row(title: str, cell: Callable[[dict[str, Any]], str]) -> Claim:
    """A row of the table of the models at full size."""

    def words(results: Results) -> str:
        return f"| {title} | {' | '.join(cell(model) for model in _models(results))} |"

    return Claim(PAGE, words)


def _seconds_at_k(results: Results) -> str:
    trained = [model["generation"][1] for model in _models(results)]
    ks = ", ".join(f"{one['mean_k_prompts']:.2f}" for one in trained)
    seconds = " | ".join(f"{one['seconds_per_sample']:.3g}" for one in trained)
    return f"| seconds per sample at GeMoE's k (untrained: {ks}) | {seconds} |"


def _gflops(model: dict[str, Any]) -> str:
    return " to ".join(f"{one['gflops_per_prompt_token']:.2f}" for one in model["generation"])


def _python(results: Results) -> str:
    """While loading, what all ranks have touched beyond the checkpoint's bytes."""

    def beyond(model: dict[str, Any]) -> float:
        touched: int = sum(model["phases"][0]["share_bytes"])
        return (touched - model["checkpoint_bytes"]) / model["ranks"]

    sizes = {f"{beyond(model) / 1e9:.1f}" for model in _models(results)}
    return f"Python and its packages, {' to '.join(sorted(sizes))} GB a rank"


def _cached(results: Results) -> str:
    seconds = _models(results)[0]["phases_resumed"][0]["seconds"]
    return f"From the file cache OLMoE takes {seconds:.0f} s"


def _measured(index: int, before: str, after: str) -> Claim:
    return Claim(PAGE, lambda r: f"{before}/ {peak(_models(r)[index]) / 2**30:.2f}{after}")


AT_FULL_SIZE = [
    _row("checkpoint, GB", lambda m: f"{m['checkpoint_bytes'] / 1e9:.1f}"),
    _row("kept by a rank, GB", lambda m: f"{m['kept_bytes_per_rank'] / 1e9:.2f}"),
    _row(
        "peak of a rank while loading / what it keeps",
        lambda m: f"{m['loading_peak_over_kept']:.3f}",
    ),
    _row(
        "peak of all ranks while loading / checkpoint",
        lambda m: f"{m['loading_node_over_checkpoint']:.2f}",
    ),
    _row("loading, GB/s, with building the model", lambda m: f"{m['read_bytes_per_s'] / 1e9:.2f}"),
    _row("`dd` from the same disk just before, GB/s", lambda m: f"{m['dd_bytes_per_s'] / 1e9:.2f}"),
    _row(
        "seconds per sample at k = 8, 6",
        lambda m: f"{m['generation'][0]['seconds_per_sample']:.2f}",
    ),
    Claim(PAGE, _seconds_at_k),
    _row("GFLOPs per token of the prompt, language model", _gflops),
    Claim(PAGE, _python),
    Claim(PAGE, _cached),
]

CLAIMS = [
    Claim(PAGE, _samples),
    Claim(PAGE, _beside),
    *(_recipes(name) for name in ("olmoe", "molmoe", "deepseek_vl2", "qwen3_vl")),
    *AT_FULL_SIZE,
    _measured(0, "", " and"),
    _measured(1, "", " ([results/full_size.json]"),
    # the estimates beside the two, of the program as it was; the file has none
    Claim(PAGE, "at full size with EP 2, OLMoE 7.65 /", _NOV_25),
    Claim(PAGE, "DeepSeek-VL2-Tiny 5.75 /", _NOV_25),
    Claim(PAGE, TEXT_ONLY, _NOV_25),
    Claim(PAGE, PICTURES, _PICTURES),
    Claim(PAGE, PICTURES_IN_BFLOAT16, _NOV_28),
    Claim(PAGE, "(10.4 against 8.7 GiB in the OLMoE of 230 million parameters below)", _NOV_25),
    Claim(PAGE, "75 MiB for DeepSpeed's engine and the first kernels", _NOV_25),
    Claim(PAGE, "0.6 to 3 MB for every new shape of a product", _NOV_28),
    Claim(PAGE, "the small DeepSeek-VL2 took 1.9 GiB in bfloat16 instead of 1.53", _NOV_28),
    Claim(
        PAGE,
        "With ZeRO 3 DeepSeek-VL2-Tiny peaked at 1.16 while loading and at 1.21 while the engine "
        "was built.",
        ByHand(
            command="python -m experiments.full_size --backbones deepseek_vl2, with ZeRO 3",
            commit="2ee9912",
            machine="2 x AMD EPYC",
            date="2026-11-25",
        ),
    ),
    Claim(
        PAGE,
        "The disk gave `dd` 0.67 to 1.76 GB/s within two hours. In turn with it, with an empty "
        "file cache, DeepSeek-VL2-Tiny was read at 0.81 to 0.96 of its rate, OLMoE at 0.64 to "
        "0.78.",
        ByHand(
            command="dd and loading in turn: five pairs, four of OLMoE",
            commit="d19e5d6, e72551c",
            machine="2 x AMD EPYC",
            date="2026-11-25",
        ),
    ),
]

NOT_MEASURED = {
    PAGE: [
        "dry run of a tiny model to 10 %",  # tests/train/test_estimate.py
        "within 10 or 12 % of what autograd keeps",  # tests/models/cost/test_activations.py
        "2 CPU cores, 24 GB",  # of the machine
        "What all ranks hold above 1.0",  # the checkpoint itself
    ]
}
