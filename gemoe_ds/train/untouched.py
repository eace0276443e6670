"""The untouched backbone at the mean k of a trained model: static k, and the rule `score`.

Its own gates choose among the same experts, so that there is no second model. A run that does worse
than this has trained for nothing.

Shapes: N samples, G groups, each of which weighs the same in a mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gemoe_ds.config import RunConfig
from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.budget import MOST_OFF, fit_budget_to
from gemoe_ds.evaluation.score import Scores
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.router import Router
from gemoe_ds.routers.score import ScoreRouter
from gemoe_ds.routers.top_k import TopKRouter

STEPS = {"static": 1.0, "score": 0.5}  # of the mean k, between two evaluations; a line joins them
CALIBRATION_SAMPLES = 128  # few: the mean k that counts is that of the evaluation which follows
ERRORS = 2.0  # standard errors by which a difference is more than chance

# Routers, a number of samples (None: all), what a progress bar says (None: no bar) -> what they
# score. Collective.
Score = Callable[[Sequence[Router], int | None, str | None], Scores]


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean over groups of sum of values / sum of weights; and what each sample adds to it."""

    value_NG: np.ndarray
    weight_NG: np.ndarray

    @property
    def there(self) -> np.ndarray:
        """Groups of which there is anything, bool [G]."""
        return np.asarray(self.weight_NG.any(0))

    @property
    def value(self) -> float:
        there_G = self.there
        if not there_G.any():
            return 0.0
        value_G = self.value_NG[:, there_G].sum(0, dtype=float)
        return float((value_G / self.weight_NG[:, there_G].sum(0, dtype=float)).mean())

    def minus(self, other: Mean) -> tuple[float, float]:
        """The difference of two means over the same samples, and its standard error.

        Paired, and clustered by sample: that of a ratio, linearised. Infinite for one sample.
        """
        there_G = self.there & other.there
        number = int(self.weight_NG.any(1).sum())
        if number < 2 or not there_G.any():
            return self.value - other.value, math.inf
        weight_NG = self.weight_NG[:, there_G].astype(float)
        apart_NG = self.value_NG[:, there_G].astype(float) - other.value_NG[:, there_G]
        total_G = weight_NG.sum(0)
        apart_G = apart_NG.sum(0) / total_G
        of_sample_N = ((apart_NG - apart_G * weight_NG) / total_G).mean(1)
        error = math.sqrt(number / (number - 1) * float(np.square(of_sample_N).sum()))
        return float(apart_G.mean()), error


@dataclass(frozen=True, eq=False)
class Outcome:
    """One evaluation as far as others are compared with it."""

    mean_k: float
    loss: Mean  # one group
    accuracy: Mean  # a group for each kind of question

    @classmethod
    def of(cls, scores: Scores, num_samples: int) -> Outcome:
        kinds = {kind: n for n, kind in enumerate(sorted(scores.asked | scores.not_asked))}
        losses_NG, targets_NG = np.zeros((2, num_samples, 1), np.float32)
        right_NG, asked_NG = np.zeros((2, num_samples, len(kinds)), np.float32)
        by, questions = scores.by_sample, scores.questions
        losses_NG[by.row_D, 0], targets_NG[by.row_D, 0] = by.ce_D, by.targets_D
        kind_C = np.array([kinds[kind] for kind in questions.kinds_C.tolist()], int)
        place_Q = questions.row_Q, kind_C[questions.kind_Q]
        np.add.at(right_NG, place_Q, questions.right_Q)
        np.add.at(asked_NG, place_Q, 1)
        return cls(scores.mean_k, Mean(losses_NG, targets_NG), Mean(right_NG, asked_NG))

    def towards(self, other: Outcome, mean_k: float) -> Outcome:
        """At a mean k between the two, on the line that joins them."""
        width = other.mean_k - self.mean_k
        share = min(max((mean_k - self.mean_k) / width, 0.0), 1.0) if width > 0 else 0.0

        def between(a: Mean, b: Mean) -> Mean:
            return Mean((1 - share) * a.value_NG + share * b.value_NG, a.weight_NG)

        return Outcome(
            self.mean_k + share * width,
            between(self.loss, other.loss),
            between(self.accuracy, other.accuracy),
        )

    @property
    def metrics(self) -> dict[str, float]:
        found = {"loss": self.loss.value}
        return found | ({"accuracy": self.accuracy.value} if self.accuracy.there.any() else {})


class Untouched:
    """Evaluates it where it is asked for, and keeps what it has found. Collective."""

    def __init__(self, model: MoEModel, num_samples: int, score: Score) -> None:
        self.num_samples, self.score = num_samples, score
        self.num_experts = min(spec.num_experts for spec in model.routing)
        self.top_k = min(spec.top_k for spec in model.routing)
        self.static = _routers(TopKRouter, model)
        self.by_score = _routers(ScoreRouter, model) if self.top_k > 1 else []
        self.found: dict[tuple[str, float], Outcome] = {}

    def at(self, mean_k: float) -> dict[str, Outcome]:
        """By the names of `STEPS`, those that can be had at a mean k."""
        outcomes = {}
        can = {"static": 1 <= mean_k <= self.num_experts, "score": 1 < mean_k < self.top_k}
        for name, step in STEPS.items():
            if not can[name]:
                continue
            low = math.floor(mean_k / step) * step
            outcome = self._point(name, low)
            if low < mean_k:
                outcome = outcome.towards(self._point(name, low + step), mean_k)
            if abs(outcome.mean_k - mean_k) <= MOST_OFF * mean_k:
                outcomes[name] = outcome
        return outcomes

    def _point(self, name: str, mean_k: float) -> Outcome:
        if mean_k in (1, self.top_k):
            name = "static"  # where `score` keeps the best expert alone, or all that it may
        key = name, mean_k
        if key not in self.found:
            routers = self._held_to(mean_k) if name == "score" else self._static(int(mean_k))
            scores = self.score(routers, None, f"untouched, {name} k {mean_k:g}")
            self.found[key] = Outcome.of(scores, self.num_samples)
        return self.found[key]

    def _static(self, k: int) -> list[Router]:
        for router in self.static:
            router.k = router.static_k = k  # type: ignore[assignment]
        return self.static

    def _held_to(self, mean_k: float) -> list[Router]:
        """As `gemoe evaluate --router score --mean-k` does it; as near as it comes."""

        def measured() -> list[float]:
            scores = self.score(self.by_score, CALIBRATION_SAMPLES, None)
            per_layer: list[float] = (scores.load_LE.sum(1) / max(scores.num_tokens, 1)).tolist()
            return per_layer

        try:
            fit_budget_to(self.by_score, mean_k, measured)
        except ConfigError:  # missed, by the mean k that is then found
            pass
        return self.by_score


def _routers(kind: type[Router], model: MoEModel) -> list[Router]:
    """One for each layer, on the gate of the backbone; no part of the model."""
    routers = []
    for layer in model.moe_layers:
        assert layer.base is not None, "a backbone that stays as it is has kept its gates"
        with torch.device("meta"):  # no random number is drawn
            router = kind(kind.Config(), layer.base.spec)
        router.gate = layer.base.gate
        router.training = False
        routers.append(router)
    return routers


def not_compared(config: RunConfig) -> str | None:
    """How to see, after a run that evaluated nothing, what it has not shown."""
    can = config.model.trainable == "routers" and config.data.is_validated
    if not can or config.train.eval_every or not config.train.compare_untouched:
        return None
    run = config.output_dir
    return (
        f"not compared with the untouched backbone: train.eval_every={config.num_steps} does it "
        f"at the end of a run; now, `gemoe evaluate {run}/config.yaml --trained {run}` gives the "
        "mean k, and `--router score --mean-k` without --trained the backbone's accuracy there"
    )


def described(mean_k: float, untouched: dict[str, Outcome]) -> str:
    """What the untouched backbone does at a mean k, in words."""
    low, high = math.floor(mean_k), math.ceil(mean_k)
    names = {"static": f"static k {low}", "score": "router score"}
    if low < high:
        names["static"] = f"static, interpolated between k {low} and {high},"
    said = []
    for name, outcome in untouched.items():
        said.append(f"{names[name]} loss {outcome.loss.value:.4f}")
        if outcome.accuracy.there.any():
            said[-1] += f", accuracy {100 * outcome.accuracy.value:.2f} %"
    if not untouched:
        said.append("nothing to compare, neither rule goes there")
    elif "score" not in untouched and low < high:
        said.append("router score cannot be held there")
    return f"untouched backbone at mean k {mean_k:.3f}: {'; '.join(said)}"


def warning(trained: Outcome, untouched: dict[str, Outcome]) -> str | None:
    """What the untouched backbone does better, by more than chance; None if there is nothing."""
    found = []
    for name, other in untouched.items():
        for of, sign, scale, unit in (("loss", 1, 1, ""), ("accuracy", -1, 100, " %")):
            mine, theirs = getattr(trained, of), getattr(other, of)
            worse, error = mine.minus(theirs)
            diverged = math.isnan(worse) and math.isfinite(theirs.value)
            if sign * worse > ERRORS * error or diverged:
                found.append(
                    f"{of} {scale * mine.value:.4f}{unit} against {scale * theirs.value:.4f}{unit} "
                    f"of {name} (difference's standard error {scale * error:.4f})"
                )
    if not found:
        return None
    return (
        f"WARNING: training does worse than the untouched backbone at this mean k: "
        f"{'; '.join(found)}. See docs/training.md, Worse than nothing"
    )
