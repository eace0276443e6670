"""Contests whose outcome is known: a small grid, and answers that are right as often as is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.compare.answers import Answers, Contest, Measured, Trial, Tried
from experiments.compare.grid import UNTOUCHED, Grid
from experiments.compare.jobs import chosen_for
from experiments.compare.trials import SETS
from gemoe_ds.analysis.questions import Questions

SIZE = {
    "backbones": ["first", "second"],
    "seeds": [0, 1, 2],
    "budgets": [2.8, 4, 6.2],
    "captions": True,
    "steps": 250,
    "split": "test",
    "samples": None,
    "calibration_samples": 64,
}
TRIALS = [{"optim.lr": 3e-4}, {"optim.lr": 1e-3}]
GRID: dict[str, Any] = {
    "recipe": "experiments/recipes/demo_gemoe.yaml",
    "settings": {"parallel.ep_size": 1},
    "backbones": {
        "first": "experiments/backbones/annealed",
        "second": "experiments/backbones/plain",
    },
    "training": {"mixed": "runs/demo/data/train", "captions": "runs/demo/data/captions"},
    "trials_each": 2,
    "trial_budget": 4,
    "ours": "score",
    "reference": "gemoe",
    "control": "tuned 8",
    "full": SIZE,
    "quick": SIZE | {"seeds": [0], "backbones": ["first"], "steps": 50, "captions": False},
    "rows": {
        "static": {
            "label": "Static",
            "gates": "untouched",
            "router": {"name": "top_k"},
            "knob": {"k": [8, 4, 2]},
        },
        "tuned": {
            "label": "Tuned",
            "router": {"name": "top_k"},
            "knob": {"k": [8, 4, 2]},
            "captions": [8, 2],
            "quick": [4],
            "trials": TRIALS,
        },
        "score": {"label": "Ours", "gates": "tuned 8", "router": {"name": "score"}},
        "gemoe": {"label": "GeMoE", "router": {"name": "gemoe"}, "trials": TRIALS},
        "free": {
            "label": "Free",
            "router": {"name": "moepp"},
            "knob": {"free": {"nine": {"zero": 3, "copies": 3, "constant": 3}, "one": {"zero": 1}}},
            "captions": ["nine", "one"],
            "quick": ["nine"],
            "trials": TRIALS,
        },
    },
}
POINTS = {"static": (8, 4, 2), "tuned": (8, 4, 2), "score": (2.8, 4, 6.2), "gemoe": (2.8, 4, 6.2)}
POINTS["free"] = (5.2, 3.5)
ASKED = Questions.of(
    (row, turn, f"kind {turn % 3}", False) for row in range(400) for turn in range(6)
)
_EASE_Q = np.random.default_rng(0).random(len(ASKED.row_Q))  # questions that are hard for all


def grid(**changed: Any) -> Grid:
    return Grid.model_validate(GRID | changed)


def planted(
    levels: Mapping[tuple[str, str], Mapping[str, float]], tried: bool = True, **changed: Any
) -> Answers:
    """By backbone and training set, of every row the share that is right at each of its points."""
    made, measured, right = grid(**changed), [], []
    rng = np.random.default_rng(1)
    for (backbone, training), of_row in levels.items():
        for name, level in of_row.items():
            row = made.rows[name]
            free = row.gates == UNTOUCHED
            seeds = (
                [None] if free else [0, 1, 2] if (backbone, training) == ("first", "mixed") else [0]
            )
            values = row.values if row.knob else [None] * len(POINTS[name])
            for seed in seeds:
                for value, mean_k in zip(values, POINTS[name], strict=True):
                    noise_Q = rng.random(_EASE_Q.size) < 0.01
                    right.append((_EASE_Q < level) ^ noise_Q)
                    measured.append(
                        Measured(
                            row=name,
                            value=value,
                            budget=None if row.knob else mean_k,
                            backbone=backbone,
                            training=training,
                            seed=seed,
                            mean_k=mean_k,
                            accuracy=float(right[-1].mean()),
                            seconds=10,
                            train_seconds=None if free else 60,
                            machine="2 x Test CPU",
                            commit="0123abc",
                            date="2026-01-02T03:04:05+00:00",
                            fingerprint=f"{backbone} {training} {name} {value} {seed}",
                        )
                    )
    trials = [
        Trial(setting=s, mean_k=4.1, accuracy=0.8, above_static=0.01 * i)
        for i, s in enumerate(TRIALS)
    ]
    outcome = {
        chosen_for(name, training): Tried(trials=tuple(trials), taken=1)
        for training in SETS
        for name, row in made.rows.items()
        if row.trains
    }
    contest = Contest(
        command="python -m experiments.compare",
        grid=made,
        is_quick=False,
        tried=outcome if tried else {},
        measured=tuple(measured),
        missing=(),
    )
    return Answers(contest, ASKED, np.stack(right))
