"""Evaluations made of literal or seeded numbers, for the tests of analysis/."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from gemoe_ds.analysis.ablation import Ablation, Pairs, summary
from gemoe_ds.analysis.gains import Gain, gains_of
from gemoe_ds.analysis.questions import Questions
from gemoe_ds.analysis.record import EvalRecord, routing_summary
from gemoe_ds.analysis.routing_sums import IMAGE, PROMPT, RoutingSums, entropy_bins
from gemoe_ds.analysis.samples import Samples

KINDS = ("caption", "count", "exist", "fact", "relation", "text")
GROUND = {
    "commit": "0123abc",
    "machine": "2 x Test CPU",
    "date": "2026-01-02T03:04:05+00:00",
    "backbone_k": 8,
}


def record(method: str, k: int | None, accuracy: dict[str, float], **changed: Any) -> EvalRecord:
    """Two layers of 64 experts; every number that is not given follows from k or is a constant."""
    per_layer = changed.pop("mean_k_per_layer", (k, k))
    mean_k = sum(per_layer) / len(per_layer)
    values = GROUND | {
        "method": method,
        "k": k,
        "seed": 0,
        "num_experts": 64,
        "accuracy": sum(accuracy.values()) / len(accuracy),
        "accuracy_by_kind": accuracy,
        "num_questions_by_kind": {kind: 1000 for kind in accuracy},
        "accuracy_micro": sum(accuracy.values()) / len(accuracy),
        "mean_k": mean_k,
        "mean_k_per_layer": per_layer,
        "mean_k_vision": mean_k,
        "mean_k_text": mean_k,
        "activated_parameters": 400_000,
        "total_parameters": 2_000_000,
        "entropy_per_layer": (4.0, 3.5),
        "spearman_per_layer": (None, None),
        "load_max_over_mean_per_layer": (2.0, 2.5),
        "idle_experts_per_layer": (0, 1),
        "seconds": 10.0,
        "tokens": 50_000,
        "checkpoint": "runs/x",
        "command": f"python launch/evaluate.py {method} {k}",
    }
    return EvalRecord(**values | changed)


def tokens(
    k: int | None, seed: int = 0, num_layers: int = 4, num_tokens: int = 30_000
) -> dict[str, np.ndarray]:
    """entropy_LN (2 to 6 bits), k_LN and is_vision_N; k follows entropy unless it is fixed."""
    rng = np.random.default_rng(seed)
    is_vision_N = rng.random(num_tokens) < 0.6
    centre_L1 = np.linspace(4.6, 3.9, num_layers)[:, None]
    entropy_LN = centre_L1 + 0.7 * rng.standard_normal((num_layers, num_tokens))
    entropy_LN = np.clip(entropy_LN + 0.5 * ~is_vision_N, 2, 6).astype(np.float32)
    if k is not None:
        return {
            "entropy_LN": entropy_LN,
            "k_LN": np.full(entropy_LN.shape, k),
            "is_vision_N": is_vision_N,
        }
    growth_L1 = np.linspace(1.5, 1.9, num_layers)[:, None]
    soft_LN = 8 / (1 + np.exp(-growth_L1 * (entropy_LN - 4.0)))
    soft_LN = soft_LN + 0.3 * rng.standard_normal(soft_LN.shape)
    k_LN = np.clip(np.rint(soft_LN), 1, 8).astype(np.int64)
    return {"entropy_LN": entropy_LN, "k_LN": k_LN, "is_vision_N": is_vision_N}


def evaluation(
    method: str, k: int | None, loss: float, seed: int = 0
) -> tuple[EvalRecord, RoutingSums]:
    """Four layers, six kinds; `loss`: points below the baseline, unlike for every kind."""
    arrays = tokens(k, seed)
    rng = np.random.default_rng([seed, k or 99])
    share = np.array([0.4, 1.1, 0.3, 2.3, 1.2, 0.7])
    noise = 0.15 * rng.standard_normal(len(KINDS)) * (method != "top_k")
    level = np.array([97.1, 92.4, 99.2, 90.6, 88.3, 95.0])
    accuracy = (level - loss * share + noise) / 100
    sums = sums_of(**arrays)
    load_LE = rng.gamma(2.0, 500.0, (4, 64)).round()
    summary = routing_summary(sums) | {
        "load_max_over_mean_per_layer": (load_LE.max(1) / load_LE.mean(1)).tolist(),
        "idle_experts_per_layer": (load_LE == 0).sum(1).tolist(),
    }
    made = record(
        method,
        k,
        dict(zip(KINDS, accuracy.clip(0, 1).tolist(), strict=True)),
        seed=seed,
        activated_parameters=round(250_000 + 25_000 * summary["mean_k"]),
        mean_k_by_token_kind={
            "image": (arrays["k_LN"][:, arrays["is_vision_N"]].mean(1)).tolist(),
            "answer": (arrays["k_LN"][:, ~arrays["is_vision_N"]].mean(1)).tolist(),
        },
        num_tokens_by_kind={"image": 18_000, "answer": 12_000},
        mean_k_in_answer=[4.0, 5.0, 5.5, 6.0],
        num_answer_tokens=[6000, 4000, 1500, 500],
        train_seconds=None if method == "top_k" else 61.0,
        **summary,
    )
    return made, sums


def demo_evaluations() -> list[tuple[EvalRecord, RoutingSums]]:
    """What `make demo-seeds` leaves behind, in kind: 7 static rows, 2 tuned, 3 seeds of GeMoE."""
    losses = {8: 0, 7: 0.1, 6: 0.5, 5: 1.4, 4: 3.0, 3: 6.2, 2: 12.1}
    static = [evaluation("top_k", k, loss) for k, loss in losses.items()]
    tuned = [evaluation("top_k_tuned", 8, -0.2), evaluation("top_k_tuned", 5, 0.9)]
    return static + tuned + [evaluation("gemoe", None, 0.2, seed) for seed in range(3)]


def pairs_of(number: int = 600, seed: int = 0, noise: float = 0.1) -> Pairs:
    """The cost is score x norm, up or down, and a little noise."""
    rng = np.random.default_rng(seed)
    score_P, norm_P = rng.random(number) * 0.3, rng.gamma(4.0, 1.0, number)
    sign_P = np.where(rng.random(number) < 0.6, 1, -1)
    noise_P = noise * rng.standard_normal(number)
    return Pairs(
        sample_P=np.sort(rng.integers(0, 60, number)).astype(np.int32),
        position_P=np.arange(number, dtype=np.int32),
        is_vision_P=rng.random(number) < 0.5,
        layer_P=rng.integers(0, 2, number).astype(np.int16),
        expert_P=rng.integers(0, 64, number).astype(np.int16),
        rank_P=rng.integers(1, 9, number).astype(np.int16),
        score_P=score_P,
        best_score_P=score_P + rng.random(number),
        better_P=rng.random(number),
        entropy_P=rng.random(number) * 6,
        norm_P=norm_P,
        first_order_P=sign_P * score_P * norm_P + noise_P,
        cost_P=sign_P * score_P * norm_P,
    )


def ablation_of(pairs: Pairs, **changed: object) -> Ablation:
    values = {"method": "top_k", "k": 8, "budget_k": None, "seed": 0, "loss": 5.0}
    values |= {"checkpoint": None, "command": "c", "commit": None, "machine": "m", "date": "d"}
    return Ablation(**(values | summary(pairs, 2) | changed))


def gains(seed: int = 0) -> tuple[Gain, ...]:
    """From 2 and 4 experts to 8: more where the entropy is higher."""
    rng = np.random.default_rng(seed)
    entropy_S = rng.random(200) * 3
    samples = Samples.of({row: (entropy_S[row], 1 - entropy_S[row] / 4) for row in range(200)})
    luck_S = rng.random(200)

    def asked(k: int) -> Questions:
        right_S = luck_S < 0.9 - 0.05 * (8 - k) * entropy_S
        return Questions.of((row, 0, "x", bool(right_S[row])) for row in range(200))

    return gains_of({k: asked(k) for k in (2, 4, 8)}, samples, 8)


def sums_of(
    entropy_LN: np.ndarray, k_LN: np.ndarray, is_vision_N: np.ndarray, experts: int = 64
) -> RoutingSums:
    """Of tokens that are all kept; those that are no image are of a prompt, ten to a document.

    A token gets the first k experts.
    """
    num_layers, num_tokens = k_LN.shape
    width = int(k_LN.max(initial=0)) + 1
    k_LN, kind_N = k_LN.astype(np.int64), np.where(is_vision_N, IMAGE, PROMPT)
    sums = RoutingSums.empty(num_layers, experts)
    sums = replace(sums, **sums.widened(width))
    sums.tokens_M += np.bincount(kind_N, minlength=3)
    for layer, (entropy_N, k_N) in enumerate(zip(entropy_LN, k_LN, strict=True)):
        np.add.at(sums.k_hist_MLK, (kind_N, layer, k_N), 1)
        np.add.at(sums.entropy_sum_ML, (kind_N, layer), entropy_N)
        np.add.at(sums.joint_LBK, (layer, entropy_bins(entropy_N, experts), k_N), 1)
        for expert in range(min(experts, width)):
            sums.load_MLE[:, layer, expert] = np.bincount(kind_N[k_N > expert], minlength=3)
        if layer:
            sums.transitions_LEE[layer - 1, 0, 0] = (k_LN[layer - 1 : layer + 1] > 0).all(0).sum()
    doc_N = np.arange(num_tokens) // 10
    hash_N = np.random.default_rng(0).integers(0, 2**63, num_tokens).astype(np.uint64)
    order = np.argsort(hash_N)[: sums.limit]
    return replace(
        sums,
        hash_N=hash_N[order],
        entropy_LN=entropy_LN[:, order].astype(np.float32),
        k_LN=k_LN[:, order].astype(np.int16),
        kind_N=kind_N[order].astype(np.int8),
        doc_id_D=np.unique(doc_N),
        prompt_tokens_D=np.bincount(doc_N),
        written_tokens_D=np.bincount(doc_N) * 0,
        k_prompt_D=np.bincount(doc_N, k_LN.sum(0)).astype(np.int64),
        k_written_D=np.bincount(doc_N) * 0,
        entropy_prompt_D=np.bincount(doc_N, entropy_LN.sum(0, dtype=float)),
        entropy_written_D=np.bincount(doc_N) * 0.0,
    )


def same_sums(found: RoutingSums, expected: RoutingSums) -> None:
    """Every number, to the bit."""
    found.check()
    for name, array in vars(expected).items():
        other = getattr(found, name)
        assert other.dtype == array.dtype and np.array_equal(other, array), name
