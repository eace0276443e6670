"""Folders as `gemoe benchmark answer` and `score` leave them, made of seeded numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemoe_ds.analysis.benchmarks.collect import Answered
from gemoe_ds.analysis.benchmarks.files import (
    MODE,
    SCORED,
    SCORES,
    SHOWN,
    Mode,
    Scores,
    ShownAnswer,
    shown_line,
)
from gemoe_ds.analysis.benchmarks.routing import ROUTING
from gemoe_ds.analysis.routing_sums import NUM_BINS, RoutingSums, entropy_bins

LAYERS, EXPERTS, BACKBONE_K = 3, 8, 4
HARNESS = {"mmlu": "lm_eval 0.4.13", "gsm8": "lm_eval 0.4.13", "bbh_": "lm_eval 0.4.13"}
METRICS = {  # task (or how it begins) -> keys of the mean of right_N, as the harnesses write them
    "mmlu": ["acc,none"],
    "gsm8k": ["exact_match,strict-match", "exact_match,flexible-extract"],
    "mmbench_en_dev_static": [],
    "pope": ["pope_accuracy,none"],
    "mme": [],
    "ai2d": ["exact_match,flexible-extract"],
    "infovqa_val": ["anls,none"],
    "mmmu_val": ["mmmu_acc,none"],
}


def mode_of(method: str, k: int | None = None, **changed: Any) -> Mode:
    values = {
        "method": method,
        "k": k,
        "seed": 0,
        "backbone": "olmoe",
        "base": "models/tiny-olmoe",
        "checkpoint": None if method == "top_k" else "runs/x/checkpoints/step-000200",
        "backbone_k": BACKBONE_K,
        "num_experts": EXPERTS,
        "total_parameters": 10_000_000,
        "parameters_per_expert": (100_000,) * LAYERS,
        "command": f"gemoe benchmark answer {method}",
        "commit": "0123abc",
        "machine": "2 x Test CPU",
        "date": "2026-01-02T03:04:05+00:00",
    }
    return Mode(**values | changed)


def routing_of(documents: int, k: int | None, seed: int = 0, tokens: int = 12) -> RoutingSums:
    """Every document has `tokens` tokens; k follows the entropy unless it is fixed."""
    rng = np.random.default_rng([seed, documents, tokens])
    number = documents * tokens
    kind_N = np.arange(number) % tokens // ((tokens + 2) // 3)
    hardness_N = np.repeat(rng.random(documents), tokens)  # of its document
    noise_LN = 0.4 * rng.standard_normal((LAYERS, number))
    entropy_LN = np.clip(1.2 + 1.2 * hardness_N + noise_LN, 0.05, 2.95).astype(np.float32)
    follows_LN = np.clip(np.rint(entropy_LN * 2), 1, EXPERTS).astype(np.int16)
    k_LN = follows_LN if k is None else np.full_like(follows_LN, k)
    width = int(k_LN.max()) + 1
    order_LNE = rng.random((LAYERS, number, EXPERTS)).argsort(-1)
    sums = RoutingSums.empty(LAYERS, EXPERTS)
    sums.tokens_M = np.bincount(kind_N, minlength=3)
    sums.k_hist_MLK = np.zeros((3, LAYERS, width), np.int64)
    sums.joint_LBK = np.zeros((LAYERS, NUM_BINS, width), np.int64)
    for layer in range(LAYERS):
        np.add.at(sums.k_hist_MLK, (kind_N, layer, k_LN[layer]), 1)
        np.add.at(sums.entropy_sum_ML, (kind_N, layer), entropy_LN[layer])
        bins_N = entropy_bins(entropy_LN[layer], EXPERTS)
        np.add.at(sums.joint_LBK, (layer, bins_N, k_LN[layer]), 1)
        for place in range(width):
            has_N = k_LN[layer] > place
            np.add.at(sums.load_MLE, (kind_N[has_N], layer, order_LNE[layer, has_N, place]), 1)
        if layer:
            from_N, to_N = order_LNE[layer - 1 : layer + 1, :, 0]
            np.add.at(sums.transitions_LEE, (layer - 1, from_N, to_N), 1)
    sums.hash_N = np.sort(rng.integers(0, 2**60, number).astype(np.uint64))[: int(sums.limit)]
    kept = sums.hash_N.size
    sums.entropy_LN, sums.k_LN = entropy_LN[:, :kept], k_LN[:, :kept]
    sums.kind_N = kind_N[:kept].astype(np.int8)
    sums.doc_id_D = np.arange(documents)
    written_N = kind_N == 2
    by_document = np.repeat(np.arange(documents), tokens)
    for name, chosen_N in (("prompt", ~written_N), ("written", written_N)):
        some = by_document[chosen_N]
        setattr(sums, f"{name}_tokens_D", np.bincount(some, minlength=documents))
        k_D = np.bincount(some, k_LN.sum(0)[chosen_N], documents).astype(np.int64)
        setattr(sums, f"k_{name}_D", k_D)
        entropy_D = np.bincount(some, entropy_LN.sum(0)[chosen_N].astype(float), documents)
        setattr(sums, f"entropy_{name}_D", entropy_D)
    sums.check()
    return sums


def sums_of(answered: Answered) -> RoutingSums:
    return RoutingSums.load(answered.folder / ROUTING)


def scores_of(task: str, right_N: np.ndarray, **changed: Any) -> Scores:
    keys = METRICS.get(task) or METRICS.get(task.split("_")[0]) or ["exact_match,none"]
    metrics: dict[str, Any] = {key: float(right_N.mean()) for key in keys} | {"alias": task}
    if task == "mme":
        metrics = {"mme_perception_score,none": 800.0, "mme_cognition_score,none": 200.5}
    if task == "mmbench_en_dev_static":
        metrics = {"gpt_eval_score,none": 40.0}  # circular: no mean over documents
    if task == "ocrbench":
        metrics = {"ocrbench_accuracy,none": right_N.sum() / 1000}  # however many were asked
    if task == "pope":
        metrics["pope_f1_score,none"] = float(right_N.mean()) ** 1.1
    values = {
        "task": task,
        "harness": HARNESS.get(task[:4], "lmms_eval 0.7.3"),
        "version": 1,
        "num_documents": right_N.size,
        "metrics": metrics,
        "choices": {"num_fewshot": 0, "prompt": "default"},
        "software": {"python": "3.11.7"},
    }
    return Scores(**values | changed)


def write_task(
    folder: Path, right_N: np.ndarray, mode: Mode, shown: int = 0, **changed: Any
) -> None:
    folder.mkdir(parents=True)
    (folder / "answers.jsonl").write_text("{}\n")
    (folder / SCORES).write_text(scores_of(folder.name, right_N, **changed).model_dump_json())
    np.savez(folder / SCORED, doc_id_N=np.arange(right_N.size), right_N=right_N)
    routing_of(right_N.size, mode.k, mode.seed).save(folder / ROUTING)
    if shown:
        lines = [
            ShownAnswer(
                doc_id=doc,
                question=f"<What> is {doc} & {doc}?",
                tokens=(("It", 1.0), (" <is>", 2.5), (f" {doc}\n", 8.0)),
            )
            for doc in range(shown)
        ]
        (folder / SHOWN).write_text("\n".join(map(shown_line, lines)) + "\n")


def write_mode(
    out: Path, name: str, mode: Mode, tasks: Mapping[str, np.ndarray], shown: int = 0
) -> Path:
    folder = out / name
    folder.mkdir(parents=True)
    (folder / MODE).write_text(json.dumps(mode.model_dump()))
    for task, right_N in tasks.items():
        write_task(folder / task, right_N, mode, shown)
    return folder


def right_of(rng: np.random.Generator, number: int, share: float) -> np.ndarray:
    """The same draw of documents for every share: a higher one has the same right, and more."""
    return (rng.permutation(number) < round(share * number)).astype(float)


def demo_run(out: Path, tasks: Mapping[str, int], seeds: int = 2, **mode: Any) -> Path:
    """RUN/benchmarks: k 4 and 2 of the untouched model, and GeMoE as trained with each seed."""
    for name, method, k, level, seed in [
        ("k_4", "top_k", 4, 0.8, 0),
        ("k_2", "top_k", 2, 0.5, 0),
        *((f"trained_{seed}", "gemoe", None, 0.75 + 0.05 * seed, seed) for seed in range(seeds)),
    ]:
        right = {
            task: right_of(np.random.default_rng(place), number, level)
            for place, (task, number) in enumerate(tasks.items())
        }
        write_mode(out / "benchmarks", name, mode_of(method, k, seed=seed, **mode), right, shown=2)
    return out
