"""What the pages of a run's way say: from a checkpoint to a trained router, on any machines."""

from __future__ import annotations

from math import ceil, floor, log10

from experiments.release.claim import ByHand, Claim
from experiments.release.claims.readme import DEMO
from experiments.release.results import Results

ENGINE, CHECKPOINTS, TRAINING = "docs/engine.md", "docs/checkpoints.md", "docs/training.md"
MODELS, LAUNCHING, API = "docs/models.md", "docs/launching.md", "docs/api.md"
FROM_YOUR_MODEL = "docs/from_your_model.md"
PARITY, RESUME = "parity.json", "resume.json"


def _minutes(results: Results) -> str:
    parity = results.json(PARITY)
    minutes = round(parity["seconds"] / 60)
    return f"{_word(parity['ranks'])} gloo ranks ({minutes} minutes on two cores)"


def _word(number: int) -> str:
    return {2: "two", 3: "three", 4: "four"}.get(number, str(number))


def _worst(results: Results, kinds: tuple[str, ...], **equal: object) -> float:
    cases = results.rows(PARITY, "cases", **equal)
    return max(float(case["errors"][kind]) for case in cases for kind in kinds)


def _float32(results: Results) -> str:
    worst = _worst(results, ("gradient", "weight", "loss", "norm"), dtype="float32")
    return f"Measured: at most {worst:.1e}".replace("e-0", "e-")


def _bfloat16(results: Results) -> str:
    bound = results.json(PARITY)["bounds"]["bfloat16"]
    worst = _worst(results, ("gradient",), dtype="bfloat16")
    routers = _worst(results, ("gradient",), dtype="bfloat16", train="routers")
    return (
        f"gradients within {100 * bound:.1f} % of a tensor's norm, weights within twice that, with "
        f"the experts that the float32 reference chose. Measured: {100 * worst:.1f} %, of routers "
        f"alone {100 * routers:.1f} %."
    )


def _ceil(figure: float) -> str:
    """One digit, not below the figure."""
    power = floor(log10(figure))
    return f"{ceil(figure / 10**power)}e{power}"


def _resumed(results: Results) -> str:
    resume = results.json(RESUME)
    same = [pair["worst"] for pair in resume["pairs"] if pair["from"] == pair["to"]]
    differ = [worst for worst in same if worst]
    _, after = resume["steps before and after"]
    return (
        f"bit for bit on the same set-up ({_word(len(differ))} of {len(same)} cases differ by one "
        f"rounding, {_ceil(max(differ))}: four ranks with trainable experts under ZeRO 2), and "
        f"within {_ceil(max(pair['worst'] for pair in resume['pairs']))} over {after} steps on "
        f"another"
    )


def _pairs(results: Results) -> str:
    resume = results.json(RESUME)
    hours = round(resume["seconds"] / 3600)
    time = "an hour" if hours == 1 else f"{hours} hours"
    return f"goes from every set-up to every other, {len(resume['pairs'])} pairs in {time}"


def _spearman(results: Results) -> str:
    rho = results.row(DEMO, method="gemoe")["spearman_per_layer"]
    return f"rises in every layer, on the demo to {min(rho):.2f} to {max(rho):.2f}"


def _demo_table(results: Results) -> str:
    lines = ["| | accuracy | mean k |", "|---|---|---|"]
    for k in (8, 5):
        accuracy = 100 * results.row(DEMO, method="top_k", k=k)["accuracy"]
        lines.append(f"| base, top-{k} | {accuracy:.2f} % | {k} |")
    gemoe = results.row(DEMO, method="gemoe")
    lines.append(f"| GeMoE | {100 * gemoe['accuracy']:.2f} % | {gemoe['mean_k']:.2f} |")
    return "\n".join(lines)


CLAIMS = [
    Claim(ENGINE, _minutes),
    Claim(ENGINE, _float32),
    Claim(ENGINE, _bfloat16),
    Claim(CHECKPOINTS, _resumed),
    Claim(CHECKPOINTS, _pairs),
    Claim(FROM_YOUR_MODEL, _spearman),
    Claim(FROM_YOUR_MODEL, _demo_table),
    Claim(
        TRAINING,
        "On the demo's backbone a step took 0.53 s instead of 0.41 (GeMoE, 32 samples, one core, "
        "means of 40 steps).",
        ByHand(
            "gemoe train experiments/recipes/demo_gemoe.yaml train.micro_batch_size=32 "
            "train.steps=40, with and without train.distill",
            commit="61fd6f5",
            machine="not noted",
            date="2026-11-28",
        ),
    ),
]

NOT_MEASURED = {
    TRAINING: [
        "two multiples of 0.5 next to the mean k",
        "Version 0.31 was tried",
    ],
    ENGINE: [
        "GPUs without bfloat16 (before 8.0)",  # compute capability
        "Routers have few numbers: 2.4 million in OLMoE",  # 16 layers of 2048 x (64 + 8)
        "`stage3_prefetch_bucket_size` 0.9 of that",
        "`stage3_param_persistence_threshold` 10 times the hidden size",
    ],
    API: ["transformers 5.17"],
    MODELS: [
        "2.9 B, 3.1 B without tower",  # published_parameters of gemoe_ds/models/moe_llava
        "a minute for 60 GB from a disk of 1 GB/s",
    ],
    LAUNCHING: ["within 300 s (`GEMOE_RENDEZVOUS_SECONDS`)", "a share such as 0.01"],
}
