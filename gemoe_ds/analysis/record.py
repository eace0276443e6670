"""What an evaluation leaves: eval.json, tokens.npz, questions.npz and samples.npz.

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
from gemoe_ds.analysis.samples import Samples
from gemoe_ds.errors import DataError
from gemoe_ds.files import write_text
from gemoe_ds.registry import ConfigModel

M = TypeVar("M", bound=ConfigModel)
A = TypeVar("A")
RECORD, TOKENS, QUESTIONS, SAMPLES = "eval.json", "tokens.npz", "questions.npz", "samples.npz"
MAX_TOKENS = 20_000  # of every layer, kept for the figures

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
    """Some tokens of an evaluation, the same ones in every layer, and the k of all tokens."""

    entropy_LN: np.ndarray  # float32, bits
    k_LN: np.ndarray  # int16
    is_vision_N: np.ndarray  # bool
    k_hist_vision_LK: np.ndarray  # int64: how many image tokens of a layer got k = column
    k_hist_text_LK: np.ndarray  # int64

    @classmethod
    def draw(
        cls,
        entropy_LN: np.ndarray,
        k_LN: np.ndarray,
        is_vision_N: np.ndarray,
        *,
        limit: int = MAX_TOKENS,
        seed: int = 0,
    ) -> TokenSample:
        """Histograms of all N tokens, and `limit` of the tokens themselves, drawn at random."""
        num_tokens, width = is_vision_N.size, int(k_LN.max(initial=0)) + 1
        if entropy_LN.shape != k_LN.shape or entropy_LN.shape[1:] != is_vision_N.shape:
            raise ValueError(
                f"entropy {entropy_LN.shape}, k {k_LN.shape} and is_vision {is_vision_N.shape} "
                "are not [L, N], [L, N] and [N]"
            )
        chosen = np.arange(num_tokens)
        if num_tokens > limit:
            drawn = np.random.default_rng(seed).choice(num_tokens, limit, replace=False)
            chosen = np.sort(drawn)
        is_vision_N = is_vision_N.astype(bool)
        return cls(
            entropy_LN=entropy_LN[:, chosen].astype(np.float32),
            k_LN=k_LN[:, chosen].astype(np.int16),
            is_vision_N=is_vision_N[chosen],
            k_hist_vision_LK=_histograms(k_LN[:, is_vision_N], width),
            k_hist_text_LK=_histograms(k_LN[:, ~is_vision_N], width),
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


def _histograms(k_LN: np.ndarray, width: int) -> np.ndarray:
    rows = [np.bincount(k_N.astype(np.int64), minlength=width) for k_N in k_LN]
    return np.array(rows, dtype=np.int64).reshape(len(k_LN), width)


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


def routing_summary(
    entropy_LN: np.ndarray, k_LN: np.ndarray, is_vision_N: np.ndarray, load_LE: np.ndarray
) -> dict[str, Any]:
    """The routing fields of `EvalRecord`, from all valid tokens and the tokens of each expert."""
    if is_vision_N.size == 0:
        raise ValueError("an evaluation without tokens has no routing")
    is_vision_N = is_vision_N.astype(bool)
    per_layer_L = k_LN.mean(1, dtype=np.float64)
    return {
        "mean_k": float(per_layer_L.mean()),
        "mean_k_per_layer": per_layer_L.tolist(),
        "mean_k_vision": _mean_or_none(k_LN[:, is_vision_N]),
        "mean_k_text": _mean_or_none(k_LN[:, ~is_vision_N]),
        "entropy_per_layer": entropy_LN.mean(1, dtype=np.float64).tolist(),
        "spearman_per_layer": [spearman(h, k) for h, k in zip(entropy_LN, k_LN, strict=True)],
        "load_max_over_mean_per_layer": [
            float(load_E.max() / load_E.mean()) if load_E.any() else None for load_E in load_LE
        ],
        "idle_experts_per_layer": (load_LE == 0).sum(1).tolist(),
        "num_experts": load_LE.shape[1],
        "tokens": is_vision_N.size,
    }


def _mean_or_none(values: np.ndarray) -> float | None:
    return float(values.mean(dtype=np.float64)) if values.size else None


def write_record(
    folder: Path,
    record: EvalRecord,
    tokens: TokenSample,
    questions: Questions | None = None,
    samples: Samples | None = None,
) -> None:
    """Write all files into `folder`; eval.json comes last and is there only when all is."""
    tokens.check(record.num_layers)
    if questions:
        questions.check(record.num_questions_by_kind, record.accuracy_by_kind)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)  # never an old record beside new tokens
    for name in (QUESTIONS, SAMPLES):
        (folder / name).unlink(missing_ok=True)
    _write_arrays(folder / TOKENS, tokens)
    if questions:
        _write_arrays(folder / QUESTIONS, questions)
    if samples:
        samples.check()
        _write_arrays(folder / SAMPLES, samples)
    write_text(folder / RECORD, record.model_dump_json(indent=2) + "\n")


def read_record(folder: Path) -> tuple[EvalRecord, TokenSample]:
    """The record and tokens of an evaluation; DataError names the file and what is wrong in it."""
    record = load_json(folder / RECORD, EvalRecord, "run the evaluation again")
    tokens = _read_arrays(
        folder / TOKENS, TokenSample, lambda found: found.check(record.num_layers)
    )
    return record, tokens


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
