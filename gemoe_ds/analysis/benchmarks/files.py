"""What `gemoe benchmark answer` and `score` leave in a folder, and how it is read back.

    OUT/MODE/mode.json                 `Mode`
    OUT/MODE/TASK/scores.json          `Scores`
    OUT/MODE/TASK/scored.npz           `ScoredDocuments`
    OUT/MODE/TASK/shown.jsonl          `ShownAnswer`, one a line; optional

Shapes: N documents, L MoE layers.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from pydantic import ConfigDict, Field, ValidationError, model_validator

from gemoe_ds.analysis.record import load_json
from gemoe_ds.errors import DataError
from gemoe_ds.registry import ConfigModel

MODE, SCORES, SCORED, SHOWN = "mode.json", "scores.json", "scored.npz", "shown.jsonl"
ANSWER_AGAIN = "run `gemoe benchmark answer` again"
SCORE_AGAIN = "run `gemoe benchmark score` again"
MAX_SHOWN = 20  # documents of a task


class Mode(ConfigModel):
    """mode.json: what routes, on which model."""

    method: str = Field(pattern=r"^[a-z0-9_]+$")  # top_k (as it is), top_k_tuned, gemoe, ...
    k: int | None = Field(ge=0)  # None: the method picks k for every token
    budget_k: float | None = None  # the mean k that was asked for after training
    seed: int
    backbone: str  # model.backbone.name
    base: str | None  # the base checkpoint; None: random weights
    checkpoint: str | None  # what was trained; None: the untouched model
    # Of their weights, and the options of the training; those of earlier versions do not say.
    base_digest: str | None = None
    trained_digest: str | None = None
    training: dict[str, Any] = {}
    dtype: str | None = None  # of activations and frozen weights
    router: dict[str, Any] = {}  # its name and options
    choices: dict[str, Any] = {}  # how prompts were made, where the paper does not say
    backbone_k: int = Field(ge=1)
    num_experts: int = Field(ge=1)
    total_parameters: int = Field(ge=0)
    parameters_per_expert: tuple[int, ...] = Field(min_length=1)  # one a MoE layer
    command: str
    commit: str | None
    machine: str
    date: str  # ISO 8601, UTC

    @property
    def num_layers(self) -> int:
        return len(self.parameters_per_expert)

    def activated_parameters(self, mean_k_L: Iterable[float]) -> float:
        """Parameters that an average token uses: all but the experts that it does not visit."""
        sizes = zip(mean_k_L, self.parameters_per_expert, strict=True)
        return self.total_parameters - sum((self.num_experts - k) * size for k, size in sizes)


class Scores(ConfigModel):
    """scores.json: what the stock evaluator says of one leaf task."""

    model_config = ConfigDict(allow_inf_nan=False)

    task: str
    harness: str  # "lm_eval 0.4.13"
    version: str | int | float | None  # the task's
    num_documents: int = Field(ge=1)
    metrics: dict[str, Any]  # by the stock keys, "acc,none"
    choices: dict[str, Any]  # what the paper does not say: num_fewshot, prompt, judge, ...
    software: dict[str, Any]

    @model_validator(mode="after")
    def _has_numbers(self) -> Scores:
        if not any(_is_number(value) for value in self.metrics.values()):
            raise ValueError("metrics hold no number")
        return self

    def metric(self, key: str) -> float:
        """DataError for a key that the evaluator has not given."""
        value = self.metrics.get(key)
        if not _is_number(value):
            numbers = [name for name, found in self.metrics.items() if _is_number(found)]
            raise DataError(
                f"{self.task} has no number {key!r} in its {SCORES} ({', '.join(numbers)}): "
                f"{SCORE_AGAIN} with the versions that `make eval-env` installs"
            )
        return float(value)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, eq=False)
class ScoredDocuments:
    """scored.npz: the task's main score of every document, sorted by document."""

    doc_id_N: np.ndarray  # int64
    right_N: np.ndarray  # float64


class ShownAnswer(ConfigModel):
    """A line of shown.jsonl: an answer, word by word, with the experts that every word took."""

    doc_id: int
    question: str
    # Text of a written token, and the experts that it took to write it: mean k over layers.
    tokens: tuple[tuple[str, float], ...]


def read_mode(folder: Path) -> Mode:
    return load_json(folder / MODE, Mode, ANSWER_AGAIN)


def read_scores(folder: Path) -> Scores:
    return load_json(folder / SCORES, Scores, SCORE_AGAIN)


def read_scored(folder: Path, num_documents: int) -> ScoredDocuments:
    """DataError unless there is one finite score for each of the documents that scores.json has."""
    path = folder / SCORED
    try:
        with np.load(path, allow_pickle=False) as arrays:
            doc_id_N, right_N = arrays["doc_id_N"], arrays["right_N"].astype(np.float64)
        if doc_id_N.ndim != 1 or doc_id_N.dtype.kind != "i" or doc_id_N.shape != right_N.shape:
            raise ValueError(f"doc_id_N {doc_id_N.shape} and right_N {right_N.shape} do not agree")
        if doc_id_N.size != num_documents:
            raise ValueError(f"{doc_id_N.size:,} documents, scores.json has {num_documents:,}")
        order_N = np.argsort(doc_id_N, kind="stable")
        doc_id_N, right_N = doc_id_N[order_N], right_N[order_N]
        if (np.diff(doc_id_N) == 0).any() or not np.isfinite(right_N).all():
            raise ValueError("a document is there twice, or a score is not finite")
    except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        raise DataError(f"{path} {reason}: {SCORE_AGAIN}") from None
    return ScoredDocuments(doc_id_N, right_N)


def read_shown(folder: Path) -> tuple[ShownAnswer, ...]:
    """Some answers, the first documents first; none where the file is not there."""
    path = folder / SHOWN
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: text has U+2028
        found = [ShownAnswer.model_validate_json(line) for line in lines if line.strip()]
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DataError(f"{path} is damaged ({reason}): {ANSWER_AGAIN}, or remove it") from None
    return tuple(sorted(found, key=lambda answer: answer.doc_id)[:MAX_SHOWN])


def shown_line(answer: ShownAnswer) -> str:
    """What `read_shown` reads back: one line of JSON."""
    return json.dumps(answer.model_dump(), ensure_ascii=False)
