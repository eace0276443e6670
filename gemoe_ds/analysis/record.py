"""What an evaluation leaves: eval.json, routing.npz, questions.npz and samples.npz.

Shapes: L MoE layers, N tokens, K = largest k + 1 columns of a k histogram, E experts.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ConfigDict, Field, ValidationError, model_validator

from gemoe_ds.analysis.questions import Questions
from gemoe_ds.analysis.routing_sums import IMAGE, PROMPT, WRITTEN, RoutingSums
from gemoe_ds.analysis.samples import Samples
from gemoe_ds.errors import DataError
from gemoe_ds.files import write_text
from gemoe_ds.registry import ConfigModel

M = TypeVar("M", bound=ConfigModel)
A = TypeVar("A")
RECORD, ROUTING, QUESTIONS, SAMPLES = "eval.json", "routing.npz", "questions.npz", "samples.npz"
TOKENS = "tokens.npz"  # of earlier versions, in the place of routing.npz

Key = tuple[str, int | None, float | None, int]  # method, k, budget and seed


class EvalRecord(ConfigModel):
    """The numbers of one evaluation. Accuracies are fractions, entropies bits, k experts a token.

    Lists have one entry a MoE layer, first layer first. A number that is not defined is None: the
    Spearman correlation where k is constant, the mean k of a modality that has no token.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    method: str = Field(pattern=r"^[a-z0-9_]+$")  # top_k (as it is), top_k_tuned, gemoe, ...
    k: int | None = Field(ge=0)  # None: the method picks k for every token
    budget_k: float | None = None  # the mean k that was asked for after training
    seed: int
    backbone_k: int = Field(ge=1)  # the backbone's own k, against which sparsity counts
    num_experts: int = Field(ge=1)
    accuracy: float = Field(ge=0, le=1)  # mean over kinds
    accuracy_by_kind: dict[str, float] = Field(min_length=1)
    num_questions_by_kind: dict[str, int]
    accuracy_micro: float = Field(ge=0, le=1)  # over questions
    # Questions that no accuracy counts: their answers are cut, or their sample is left out.
    num_not_asked_by_kind: dict[str, int] = {}
    num_cut_answers: int = 0  # of these, the first
    left_out: tuple[dict[str, Any], ...] = ()  # samples: row, id, reason, needs
    mean_k: float = Field(ge=0)
    mean_k_per_layer: tuple[float, ...] = Field(min_length=1)
    mean_k_vision: float | None
    mean_k_text: float | None
    # By kind of token, every layer: image, special, question (and the chat's text), answer.
    mean_k_by_token_kind: dict[str, tuple[float, ...]] = {}
    num_tokens_by_kind: dict[str, int] = {}
    # Over all layers, of the first token of an answer, the second, ..., and all that follow.
    mean_k_in_answer: tuple[float, ...] = ()
    num_answer_tokens: tuple[int, ...] = ()
    activated_parameters: int  # of an average token
    total_parameters: int
    entropy_per_layer: tuple[float, ...]
    spearman_per_layer: tuple[float | None, ...]  # of the gating entropy and k, over tokens
    load_max_over_mean_per_layer: tuple[float | None, ...]  # tokens of the busiest expert
    idle_experts_per_layer: tuple[int, ...]
    seconds: float = Field(ge=0)  # of the evaluation
    train_seconds: float | None = Field(default=None, ge=0)  # of the router's training, if any
    tokens: int = Field(ge=0)
    checkpoint: str | None
    # What it is of. Records of earlier versions do not say.
    router: dict[str, Any] = {}  # its name and options, and how its budget was met
    dtype: str | None = None  # of activations and frozen weights
    base_digest: str | None = None
    trained_digest: str | None = None  # None: the untouched model
    training: dict[str, Any] = {}  # its options, the seed aside
    data: str | None = None
    data_fingerprint: str | None = None
    limit: int | None = None  # only the first so many samples
    command: str
    commit: str | None
    machine: str
    date: str  # ISO 8601, UTC

    @model_validator(mode="after")
    def _agree(self) -> EvalRecord:
        for name in _PER_LAYER:
            if len(getattr(self, name)) != self.num_layers:
                raise ValueError(f"{name} has not one entry for each of {self.num_layers} layers")
        if any(
            len(of_layers) != self.num_layers for of_layers in self.mean_k_by_token_kind.values()
        ):
            raise ValueError(
                f"mean_k_by_token_kind has not one entry for each of {self.num_layers} layers"
            )
        if set(self.mean_k_by_token_kind) != set(self.num_tokens_by_kind):
            raise ValueError("mean_k_by_token_kind and num_tokens_by_kind name different kinds")
        if set(self.num_questions_by_kind) != set(self.accuracy_by_kind):
            raise ValueError("accuracy_by_kind and num_questions_by_kind name different kinds")
        by_kind = self.accuracy_by_kind.values()
        if abs(self.accuracy - sum(by_kind) / len(by_kind)) > 1e-6:
            raise ValueError(f"accuracy {self.accuracy} is not the mean of accuracy_by_kind")
        if abs(self.mean_k - sum(self.mean_k_per_layer) / self.num_layers) > 1e-3:
            raise ValueError(f"mean_k {self.mean_k} is not the mean of mean_k_per_layer")
        return self

    @property
    def num_not_asked(self) -> int:
        return sum(self.num_not_asked_by_kind.values())

    @property
    def num_layers(self) -> int:
        return len(self.mean_k_per_layer)

    @property
    def key(self) -> Key:
        """No two records of a report share it."""
        return self.method, self.k, self.budget_k, self.seed


_PER_LAYER = [name for name in EvalRecord.model_fields if name.endswith("_per_layer")]


@dataclass(frozen=True, eq=False)
class TokenSample:
    """What figures show: some tokens, the same ones in every layer, and the k of all tokens."""

    entropy_LN: np.ndarray  # float32, bits
    k_LN: np.ndarray  # int16
    is_vision_N: np.ndarray  # bool
    k_hist_vision_LK: np.ndarray  # int64: how many image tokens of a layer got k = column
    k_hist_text_LK: np.ndarray  # int64

    @classmethod
    def of(cls, sums: RoutingSums) -> TokenSample:
        k_hist_MLK = sums.k_hist_MLK
        return cls(
            entropy_LN=sums.entropy_LN,
            k_LN=sums.k_LN,
            is_vision_N=sums.kind_N == IMAGE,
            k_hist_vision_LK=k_hist_MLK[IMAGE],
            k_hist_text_LK=k_hist_MLK[PROMPT] + k_hist_MLK[WRITTEN],
        )

    def check(self, num_layers: int) -> None:
        """Raise ValueError unless the shapes agree with each other and with L."""
        shape_LN = (num_layers, self.is_vision_N.size)
        shape_LK = (num_layers, self.k_hist_text_LK.shape[-1])
        for name, expected in (
            ("entropy_LN", shape_LN),
            ("k_LN", shape_LN),
            ("k_hist_vision_LK", shape_LK),
            ("k_hist_text_LK", shape_LK),
        ):
            if getattr(self, name).shape != expected:
                raise ValueError(f"{name} is {getattr(self, name).shape}, not {expected}")


def spearman(x_N: np.ndarray, y_N: np.ndarray) -> float | None:
    """Rank correlation, ties with their average rank; None where x or y is constant."""
    if x_N.shape != y_N.shape or x_N.ndim != 1:
        raise ValueError(f"spearman wants two vectors of one length, not {x_N.shape}, {y_N.shape}")
    a_N, b_N = _centred_ranks(x_N), _centred_ranks(y_N)
    scale = np.sqrt((a_N @ a_N) * (b_N @ b_N))
    return None if scale == 0 else float(np.clip(a_N @ b_N / scale, -1, 1))


def _centred_ranks(x_N: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x_N, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of a group of ties: the mean of its places
    return ranks[inverse] - (x_N.size + 1) / 2


def routing_summary(sums: RoutingSums) -> dict[str, Any]:
    """The routing fields of `EvalRecord`."""
    if sums.num_tokens == 0:
        raise ValueError("an evaluation without tokens has no routing")
    mean_k_L, k_M = sums.mean_k_L, sums.load_MLE.sum((1, 2)) / sums.num_layers
    text = [PROMPT, WRITTEN]
    return {
        "mean_k": float(mean_k_L.mean()),
        "mean_k_per_layer": mean_k_L.tolist(),
        "mean_k_vision": _mean_or_none(k_M[IMAGE], sums.tokens_M[IMAGE]),
        "mean_k_text": _mean_or_none(k_M[text].sum(), sums.tokens_M[text].sum()),
        "entropy_per_layer": sums.mean_entropy_L.tolist(),
        "spearman_per_layer": sums.spearman_L,
        "load_max_over_mean_per_layer": sums.load_max_over_mean_L,
        "idle_experts_per_layer": sums.idle_experts_L,
        "num_experts": sums.load_MLE.shape[-1],
        "tokens": sums.num_tokens,
    }


def _mean_or_none(total: float, number: int) -> float | None:
    return float(total / number) if number else None


def write_record(
    folder: Path,
    record: EvalRecord,
    routing: RoutingSums,
    questions: Questions | None = None,
    samples: Samples | None = None,
) -> None:
    """Write all files into `folder`; eval.json comes last and is there only when all is."""
    if routing.num_layers != record.num_layers:
        raise ValueError(f"routing of {routing.num_layers} layers, not of {record.num_layers}")
    if questions:
        questions.check(record.num_questions_by_kind, record.accuracy_by_kind)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)  # never an old record beside new tokens
    for name in (TOKENS, QUESTIONS, SAMPLES):
        (folder / name).unlink(missing_ok=True)
    routing.save(folder / ROUTING)
    if questions:
        _write_arrays(folder / QUESTIONS, questions)
    if samples:
        samples.check()
        _write_arrays(folder / SAMPLES, samples)
    write_text(folder / RECORD, record.model_dump_json(indent=2) + "\n")


def read_record(folder: Path) -> tuple[EvalRecord, TokenSample]:
    """The record and tokens of an evaluation; DataError names the file and what is wrong in it."""
    record = load_json(folder / RECORD, EvalRecord, "run the evaluation again")
    if (folder / TOKENS).exists():  # an evaluation of 0.1
        tokens = _read_arrays(
            folder / TOKENS, TokenSample, lambda found: found.check(record.num_layers)
        )
        return record, tokens
    sums = RoutingSums.load(folder / ROUTING)
    if sums.num_layers != record.num_layers:
        raise DataError(
            f"{folder / ROUTING} has {sums.num_layers} layers, {RECORD} beside it "
            f"{record.num_layers}: run the evaluation again"
        )
    return record, TokenSample.of(sums)


def read_questions(folder: Path, record: EvalRecord) -> Questions:
    """The questions of the evaluation in `folder`, whose record is given; DataError as above."""
    return _read_arrays(
        folder / QUESTIONS,
        Questions,
        lambda found: found.check(record.num_questions_by_kind, record.accuracy_by_kind),
    )


def read_samples(folder: Path) -> Samples:
    """The samples of the evaluation in `folder`; DataError as above."""
    return _read_arrays(folder / SAMPLES, Samples, Samples.check)


def _write_arrays(path: Path, arrays: object) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("wb") as file:
        np.savez_compressed(file, **vars(arrays))
    os.replace(partial, path)


def _read_arrays(path: Path, kind: type[A], check: Callable[[A], None]) -> A:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = kind(**arrays)
        check(found)
    except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        raise DataError(f"{path} {reason}: run the evaluation again") from None
    return found


def load_json(path: Path, model: type[M], way_out: str) -> M:
    """Read a JSON file into `model`; DataError, one line, if it is missing or not valid."""
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {way_out}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {way_out}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise DataError(f"{path} is damaged ({reason}): {way_out}") from None
