"""What leaving one expert out of one token's mixture costs, and what foretells it.

A *pair* is a token and one of its experts in one layer. Routers differ in the number of a pair by
which they leave it out, the smallest first: `PREDICTORS`. `ablation.npz` holds the pairs,
`ablation.json` what follows from them. Shapes: P pairs, S samples, R resamplings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from gemoe_ds.analysis.record import Key, load_json, spearman
from gemoe_ds.analysis.tables import aligned
from gemoe_ds.errors import DataError
from gemoe_ds.files import write_text
from gemoe_ds.registry import ConfigModel

SUMMARY, PAIRS = "ablation.json", "ablation.npz"
STEPS = 20  # of the curves
RESAMPLINGS = 1000
SLOPE = 1.2  # experts a bit of entropy: GeMoE's margin (docs/routers.md, A1)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Measured pairs, sorted by sample. `cost`: loss of the sample without it, minus with it."""

    sample_P: np.ndarray  # int32: row of the data
    position_P: np.ndarray  # int32: of the token in its sequence
    is_vision_P: np.ndarray  # bool
    layer_P: np.ndarray  # int16
    expert_P: np.ndarray  # int16
    rank_P: np.ndarray  # int16: 1 is the token's best expert
    score_P: np.ndarray  # float32, as all that follow
    best_score_P: np.ndarray  # of the token's best expert
    better_P: np.ndarray  # sum of the scores of better experts
    entropy_P: np.ndarray  # bits
    norm_P: np.ndarray  # of the expert's output, without its weight
    first_order_P: np.ndarray  # <dL/dy, change of y>: the cost, to first order
    cost_P: np.ndarray  # nats, summed over the sample's targets

    @classmethod
    def joined(cls, parts: list[Pairs]) -> Pairs:
        """In the order of the samples, whatever that of ranks and batches was."""
        whole = {f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)}
        order = np.argsort(whole["sample_P"], kind="stable")
        return cls(**{name: array[order] for name, array in whole.items()})


def _layer_means(pairs: Pairs) -> np.ndarray:
    """The mean norm of the pairs in the layer of each."""
    _, layer_P, counts = np.unique(pairs.layer_P, return_inverse=True, return_counts=True)
    means: np.ndarray = np.maximum(np.bincount(layer_P, pairs.norm_P) / counts, 1e-30)[layer_P]
    return means


# What a rule goes by, larger is kept longer: heading, value of every pair.
PREDICTORS: dict[str, tuple[str, Callable[[Pairs], np.ndarray]]] = {
    "rank": ("rank (static k)", lambda pairs: -pairs.rank_P),
    "entropy": ("entropy", lambda pairs: pairs.entropy_P),
    "entropy_rank": (
        f"{SLOPE} x entropy - rank (k by entropy)",
        lambda pairs: SLOPE * pairs.entropy_P - pairs.rank_P,
    ),
    "better": ("scores of better experts (top-p)", lambda pairs: -pairs.better_P),
    "ratio": ("score / best score", lambda pairs: pairs.score_P / pairs.best_score_P),
    "score": ("score", lambda pairs: pairs.score_P),
    "score_norm": ("score x norm of output", lambda pairs: pairs.score_P * pairs.norm_P),
    "score_norm_layer": (
        "score x norm / mean norm of the layer",
        lambda pairs: pairs.score_P * pairs.norm_P / _layer_means(pairs),
    ),
    "first_order_size": ("|gradient x change|", lambda pairs: np.abs(pairs.first_order_P)),
    "first_order": ("gradient x change (first order)", lambda pairs: pairs.first_order_P),
}


class Predictor(ConfigModel):
    """How well one number of a pair foretells its cost. Intervals: 95 %, over samples."""

    name: str
    spearman: float | None  # with the cost
    spearman_interval: tuple[float, float] | None
    size_spearman: float | None  # with |cost|: how much it moves the loss, up or down
    size_spearman_interval: tuple[float, float] | None
    size_spearman_per_layer: tuple[float | None, ...]
    # Of the half of all pairs that it would leave out first: means, and |cost| beside `score`'s.
    lower_cost: float
    lower_cost_interval: tuple[float, float]
    lower_size: float
    lower_size_beyond_score: tuple[float, float, float]  # difference, and its interval
    curve: tuple[float, ...]  # summed |cost| of the lowest 0, 1/20, ... of the pairs / all of it


class Ablation(ConfigModel):
    """Everything that is said of the pairs of one way to route. Costs in nats a pair."""

    method: str
    k: int | None
    budget_k: float | None
    seed: int
    num_pairs: int
    num_samples: int
    loss: float  # of a sample, with all its experts
    mean_cost: float
    mean_cost_interval: tuple[float, float]
    mean_cost_image: float | None
    mean_cost_text: float | None
    mean_cost_per_layer: tuple[float | None, ...]
    mean_size_per_layer: tuple[float | None, ...]  # of |cost|
    mean_cost_per_rank: tuple[float | None, ...]  # of a token's best expert, of the second, ...
    predictors: tuple[Predictor, ...]
    checkpoint: str | None
    command: str
    commit: str | None
    machine: str
    date: str

    @property
    def key(self) -> Key:
        """As that of the evaluation with the same routing."""
        return self.method, self.k, self.budget_k, self.seed


def summary(pairs: Pairs, num_layers: int) -> dict[str, object]:
    """The fields of `Ablation` that follow from the pairs."""
    cost_P = pairs.cost_P.astype(np.float64)
    if not cost_P.size:
        raise ValueError("no pair was measured")
    resample = _Resampling(pairs.sample_P)
    values = {name: of(pairs).astype(np.float64) for name, (_, of) in PREDICTORS.items()}
    # Ties are left out in a random order, the same for all: else that of the samples would count.
    shuffled = np.random.default_rng(0).permutation(cost_P.size)
    orders = {n: shuffled[np.argsort(v[shuffled], kind="stable")] for n, v in values.items()}
    low = {name: np.zeros(cost_P.size, bool) for name in values}
    for name, order in orders.items():
        low[name][order[: (cost_P.size + 1) // 2]] = True
    layers = [pairs.layer_P == layer for layer in range(num_layers)]
    size_P = np.abs(cost_P)
    predictors = []
    for name, value_P in values.items():
        beyond_R = resample.means(size_P, low[name]) - resample.means(size_P, low["score"])
        sums = np.concatenate([[0.0], np.cumsum(size_P[orders[name]])])
        size = float(size_P[low[name]].mean())
        predictors.append(
            Predictor(
                name=name,
                spearman=spearman(value_P, cost_P),
                spearman_interval=resample.rank_correlation(value_P, cost_P),
                size_spearman=spearman(value_P, size_P),
                size_spearman_interval=resample.rank_correlation(value_P, size_P),
                size_spearman_per_layer=tuple(spearman(value_P[of], size_P[of]) for of in layers),
                lower_cost=float(cost_P[low[name]].mean()),
                lower_cost_interval=_middle(resample.means(cost_P, low[name])),
                lower_size=size,
                lower_size_beyond_score=(
                    size - float(size_P[low["score"]].mean()),
                    *_middle(beyond_R),
                ),
                curve=tuple(sums[_steps(cost_P.size)] / max(sums[-1], 1e-30)),
            )
        )
    everything = np.ones(cost_P.size, bool)
    return {
        "num_pairs": cost_P.size,
        "num_samples": np.unique(pairs.sample_P).size,
        "mean_cost": float(cost_P.mean()),
        "mean_cost_interval": _middle(resample.means(cost_P, everything)),
        "mean_cost_image": _mean(cost_P[pairs.is_vision_P]),
        "mean_cost_text": _mean(cost_P[~pairs.is_vision_P]),
        "mean_cost_per_layer": tuple(_mean(cost_P[of]) for of in layers),
        "mean_size_per_layer": tuple(_mean(size_P[of]) for of in layers),
        "mean_cost_per_rank": tuple(
            _mean(cost_P[pairs.rank_P == rank]) for rank in range(1, pairs.rank_P.max() + 1)
        ),
        "predictors": tuple(predictors),
    }


def _steps(number: int) -> np.ndarray:
    return np.linspace(0, number, STEPS + 1).round().astype(int)


class _Resampling:
    """Samples drawn with replacement, all pairs of a sample together: they share its loss."""

    def __init__(self, sample_P: np.ndarray) -> None:
        rows_S, self.sample_P = np.unique(sample_P, return_inverse=True)
        num, rng = rows_S.size, np.random.default_rng(0)
        self.times_RS = rng.multinomial(num, np.full(num, 1 / num), RESAMPLINGS).astype(np.float64)

    def sums(self, value_P: np.ndarray) -> np.ndarray:
        """Of every resampling, [R]."""
        sums_R: np.ndarray = self.times_RS @ np.bincount(
            self.sample_P, weights=value_P, minlength=self.times_RS.shape[1]
        )
        return sums_R

    def means(self, value_P: np.ndarray, of_P: np.ndarray) -> np.ndarray:
        """Mean over the pairs that `of_P` marks, [R]."""
        means_R: np.ndarray = self.sums(value_P * of_P) / np.maximum(self.sums(of_P * 1.0), 1)
        return means_R

    def rank_correlation(self, x_P: np.ndarray, y_P: np.ndarray) -> tuple[float, float] | None:
        """Of the ranks among all pairs: they are not ranked anew in every resampling."""
        a_P, b_P = ranks(x_P), ranks(y_P)
        if np.ptp(a_P) == 0 or np.ptp(b_P) == 0:
            return None
        n, a, b = self.sums(np.ones_like(a_P)), self.sums(a_P), self.sums(b_P)
        cov = self.sums(a_P * b_P) - a * b / n
        variances = (self.sums(a_P**2) - a * a / n) * (self.sums(b_P**2) - b * b / n)
        return _middle(cov / np.sqrt(np.maximum(variances, 1e-12)))


def ranks(x_N: np.ndarray) -> np.ndarray:
    """Ranks with mean 0, scaled to (-1/2, 1/2); ties share their mean."""
    _, inverse, counts = np.unique(x_N, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2
    return (middle[inverse] - (x_N.size + 1) / 2) / x_N.size


def _middle(values_R: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_R, [0.025, 0.975])
    return float(low), float(high)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def write_ablation(folder: Path, ablation: Ablation, pairs: Pairs) -> None:
    """Both files; ablation.json comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).unlink(missing_ok=True)
    with (folder / PAIRS).open("wb") as file:
        np.savez_compressed(file, **vars(pairs))
    write_text(folder / SUMMARY, ablation.model_dump_json(indent=2) + "\n")


def read_ablation(folder: Path, key: Key) -> Ablation | None:
    """What `gemoe ablate` left beside the evaluation `key`; None if it was not run."""
    path = folder / SUMMARY
    if not path.exists():
        return None
    found = load_json(path, Ablation, "run gemoe ablate again")
    if found.key != key:
        raise DataError(
            f"{path} is of method, k, budget and seed {found.key}, eval.json beside it of {key}: "
            "give gemoe ablate the --out of the evaluation with the same routing"
        )
    return found


def predictor_table(ablation: Ablation) -> list[list[str]]:
    """A row for each predictor; costs in thousandths of a nat."""
    table = [
        [
            "Left out first: the smallest",
            "Spearman with |cost|",
            "95 %",
            "with cost",
            "95 %",
            "|cost| of the lower half",
            "beside score's",
            "95 %",
            "cost of the lower half",
            "95 %",
        ]
    ]
    for one in ablation.predictors:
        beyond, *around = one.lower_size_beyond_score
        table.append(
            [
                _heading(one),
                _number(one.size_spearman, 3),
                _interval(one.size_spearman_interval, 3),
                _number(one.spearman, 3),
                _interval(one.spearman_interval, 3),
                _number(one.lower_size, 2, 1000),
                "-" if one.name == "score" else _number(beyond, 2, 1000),
                "-" if one.name == "score" else _interval(around, 2, 1000),
                _number(one.lower_cost, 2, 1000),
                _interval(one.lower_cost_interval, 2, 1000),
            ]
        )
    return table


def layer_table(ablation: Ablation) -> list[list[str]]:
    """Mean cost and |cost| of a pair, and Spearman's correlation of |cost| with each predictor."""
    table = [["MoE layer", "cost", "|cost|", *map(_heading, ablation.predictors)]]
    for layer, cost in enumerate(ablation.mean_cost_per_layer):
        rhos = [_number(one.size_spearman_per_layer[layer], 3) for one in ablation.predictors]
        size = ablation.mean_size_per_layer[layer]
        table.append([str(layer + 1), _number(cost, 2, 1000), _number(size, 2, 1000), *rhos])
    return table


def _heading(predictor: Predictor) -> str:
    known = PREDICTORS.get(predictor.name)
    return known[0] if known else predictor.name


def in_words(ablation: Ablation) -> str:
    """What was measured, in a few sentences."""
    kinds = [
        f"{_number(cost, 2, 1000)} of {name} tokens"
        for name, cost in (("image", ablation.mean_cost_image), ("text", ablation.mean_cost_text))
        if cost is not None
    ]
    by_rank = ", ".join(_number(cost, 2, 1000) for cost in ablation.mean_cost_per_rank)
    return (
        f"{ablation.num_pairs:,} pairs of a token and one of its experts, of "
        f"{ablation.num_samples:,} samples, each left out alone. Costs are thousandths of a nat, "
        f"of {ablation.loss:.2f} nats a sample. The mean cost is "
        f"{_number(ablation.mean_cost, 2, 1000)} (95 %: "
        f"{_interval(ablation.mean_cost_interval, 2, 1000)}; {', '.join(kinds)}). By rank, the "
        f"best expert first: {by_rank}."
    )


def as_text(ablation: Ablation) -> str:
    """For the terminal."""
    parts = [
        [in_words(ablation)],
        aligned(predictor_table(ablation)),
        aligned(layer_table(ablation)),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _number(value: float | None, decimals: int, factor: float = 1) -> str:
    return "-" if value is None else f"{factor * value:z.{decimals}f}"


def _interval(ends: Sequence[float] | None, decimals: int, factor: float = 1) -> str:
    return "-" if ends is None else " to ".join(_number(end, decimals, factor) for end in ends)
