"""How tokens were routed: sums that do not grow with them, a sample, and a row a document.

Shapes: M kinds of tokens, L MoE layers, E experts, K = largest k + 1, B bins of the gating entropy,
N tokens of the sample, D documents.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from gemoe_ds.errors import DataError

# An answer that the data gives counts as written; the last token of one is not routed when the
# model writes it, because nothing follows.
KINDS = ("image", "prompt", "written")
IMAGE, PROMPT, WRITTEN = range(len(KINDS))
MAX_TOKENS = 20_000  # of the sample, the same ones in every layer

_LINEAR, _LOG, _FINEST, _FURTHEST = 2048, 32, 1e-3, 8.0


def entropy_bins(entropy: np.ndarray, num_experts: int) -> np.ndarray:
    """The bin of each entropy (bits), 0..NUM_BINS - 1: what is larger is never in a smaller bin.

    Narrow everywhere between 0 and log2 E, the largest entropy of a softmax, and narrower at both
    ends, where the tokens of a sure or of an undecided gate crowd. Scores that do not add up to 1
    lead beyond; the outermost bins take all that is left, and that of 0 what is no number.
    """
    share = np.nan_to_num(entropy.astype(np.float32) / np.float32(np.log2(max(num_experts, 2))))
    share = np.clip(share, 1 - _FURTHEST, _FURTHEST)
    bins: np.ndarray = (_scale(share) - _LOWEST).astype(np.int32)
    return bins


def _scale(share: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = _LINEAR * np.clip(share, 0, 1) + _LOG * (_log(share) + _log(share - 1))
    return scaled


def _log(x: np.ndarray) -> np.ndarray:
    """Odd, and logarithmic beyond `_FINEST`."""
    far: np.ndarray = np.copysign(np.log(1 + np.abs(x) * np.float32(1 / _FINEST)), x)
    return far


_LOWEST, _HIGHEST = _scale(np.array([1 - _FURTHEST, _FURTHEST], np.float32))
NUM_BINS = int(_HIGHEST - _LOWEST) + 1


@dataclass(eq=False)
class RoutingSums:
    """Of all tokens that were counted: no padding. `+` adds what others have counted.

    The sample is those tokens whose hash, of document and position, is smallest. So it is the same
    for any ranks, batches and order, and after a resume.
    """

    tokens_M: np.ndarray  # int64, as all counts
    load_MLE: np.ndarray  # tokens that an expert got
    k_hist_MLK: np.ndarray  # tokens that got k experts
    entropy_sum_ML: np.ndarray  # float64, bits
    joint_LBK: np.ndarray  # tokens of a bin of the entropy that got k experts
    transitions_LEE: np.ndarray  # [L - 1, E, E]: heaviest expert of a layer -> of the next layer
    limit: np.ndarray  # [], the most tokens of the sample
    hash_N: np.ndarray  # uint64, ascending
    entropy_LN: np.ndarray  # float32, bits
    k_LN: np.ndarray  # int16
    kind_N: np.ndarray  # int8, an index into KINDS
    doc_id_D: np.ndarray  # int64, ascending
    prompt_tokens_D: np.ndarray  # images included
    written_tokens_D: np.ndarray
    k_prompt_D: np.ndarray  # sum over tokens and layers
    k_written_D: np.ndarray
    entropy_prompt_D: np.ndarray  # float64, likewise
    entropy_written_D: np.ndarray

    @classmethod
    def empty(cls, num_layers: int, num_experts: int, limit: int = MAX_TOKENS) -> RoutingSums:
        kinds, layers, experts = len(KINDS), num_layers, num_experts
        whole = np.zeros(0, np.int64)
        return cls(
            tokens_M=np.zeros(kinds, np.int64),
            load_MLE=np.zeros((kinds, layers, experts), np.int64),
            k_hist_MLK=np.zeros((kinds, layers, 1), np.int64),
            entropy_sum_ML=np.zeros((kinds, layers)),
            joint_LBK=np.zeros((layers, NUM_BINS, 1), np.int64),
            transitions_LEE=np.zeros((max(layers - 1, 0), experts, experts), np.int64),
            limit=np.array(limit),
            hash_N=np.zeros(0, np.uint64),
            entropy_LN=np.zeros((layers, 0), np.float32),
            k_LN=np.zeros((layers, 0), np.int16),
            kind_N=np.zeros(0, np.int8),
            **dict.fromkeys(_ROWS, whole),
            **dict.fromkeys(_ENTROPY_ROWS, np.zeros(0)),
        )

    @classmethod
    def total(cls, parts: Iterable[RoutingSums]) -> RoutingSums:
        """One part after the other. ValueError for none, or parts of different models."""
        total, rows = None, []
        for part in parts:
            rows.append({name: getattr(part, name) for name in ROWS})
            if total is None:
                dense = part.widened(part.k_hist_MLK.shape[-1])
                total = replace(part, **{name: array.copy() for name, array in dense.items()})
                continue
            if part.load_MLE.shape != total.load_MLE.shape:
                raise ValueError(
                    "sums of other layers and experts cannot be added: "
                    f"{part.load_MLE.shape[1:]} to {total.load_MLE.shape[1:]}"
                )
            width = max(part.k_hist_MLK.shape[-1], total.k_hist_MLK.shape[-1])
            dense, more = total.widened(width), part.widened(width)
            limit = min(total.limit, part.limit)
            both = [{name: getattr(one, name) for name in SAMPLE} for one in (total, part)]
            sample = smallest(both, int(limit))
            total = replace(total, limit=limit, **{n: dense[n] + more[n] for n in DENSE}, **sample)
        if total is None:
            raise ValueError("no sums to add")
        return replace(total, **added_rows(rows))

    def __add__(self, other: RoutingSums) -> RoutingSums:
        return RoutingSums.total([self, other])

    def widened(self, width: int) -> dict[str, np.ndarray]:
        """The arrays of `DENSE`, with so many columns for k."""
        arrays = {name: getattr(self, name) for name in DENSE}
        more = (0, width - self.k_hist_MLK.shape[-1])
        return {
            name: np.pad(array, [(0, 0), (0, 0), more]) if more[1] and name.endswith("K") else array
            for name, array in arrays.items()
        }

    @property
    def num_layers(self) -> int:
        return self.load_MLE.shape[1]

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_M.sum())

    @property
    def load_LE(self) -> np.ndarray:
        load_LE: np.ndarray = self.load_MLE.sum(0)
        return load_LE

    @property
    def mean_k_ML(self) -> np.ndarray:
        """NaN where a kind has no token, as in all means."""
        k_K = np.arange(self.k_hist_MLK.shape[-1])
        return _ratio(self.k_hist_MLK @ k_K, self.tokens_M[:, None])

    @property
    def mean_k_L(self) -> np.ndarray:
        k_K = np.arange(self.k_hist_MLK.shape[-1])
        return _ratio(self.k_hist_MLK.sum(0) @ k_K, self.tokens_M.sum())

    @property
    def mean_entropy_L(self) -> np.ndarray:
        return _ratio(self.entropy_sum_ML.sum(0), self.tokens_M.sum())

    @property
    def spearman_L(self) -> list[float | None]:
        """Rank correlation of entropy and k over tokens; None where either is constant.

        Tokens whose entropies share a bin count as ties. With 64 experts that changed no
        correlation by .002 where entropies spread by 0.02 bits or more.
        """
        return [_rank_correlation(joint_BK) for joint_BK in self.joint_LBK]

    @property
    def load_max_over_mean_L(self) -> list[float | None]:
        """Tokens of the busiest expert; None where none has any."""
        return [float(l_E.max() / l_E.mean()) if l_E.any() else None for l_E in self.load_LE]

    @property
    def idle_experts_L(self) -> list[int]:
        idle_L: list[int] = (self.load_LE == 0).sum(1).tolist()
        return idle_L

    @property
    def mean_entropy_D(self) -> np.ndarray:
        visits_D = (self.prompt_tokens_D + self.written_tokens_D) * self.num_layers
        return _ratio(self.entropy_prompt_D + self.entropy_written_D, visits_D)

    def check(self) -> None:
        """ValueError unless shapes, types and counts agree."""
        kinds, layers, experts = self.load_MLE.shape
        width, tokens, docs = self.k_hist_MLK.shape[-1], self.hash_N.size, self.doc_id_D.size
        shapes: dict[str, tuple[int, ...]] = {
            "tokens_M": (len(KINDS),),
            "load_MLE": (len(KINDS), layers, experts),
            "k_hist_MLK": (kinds, layers, width),
            "entropy_sum_ML": (kinds, layers),
            "joint_LBK": (layers, NUM_BINS, width),
            "transitions_LEE": (max(layers - 1, 0), experts, experts),
            "limit": (),
            "entropy_LN": (layers, tokens),
            "k_LN": (layers, tokens),
        }
        shapes |= {"hash_N": (tokens,), "kind_N": (tokens,)} | dict.fromkeys(ROWS, (docs,))
        for name, array in vars(self).items():
            if array.shape != shapes[name]:
                raise ValueError(f"{name} is {array.shape}, not {shapes[name]}")
            wanted = "u" if name == "hash_N" else "f" if "entropy" in name else "i"
            if array.dtype.kind != wanted:
                raise ValueError(f"{name} is {array.dtype}")
            if wanted == "f" and not np.isfinite(array).all():
                raise ValueError(f"{name} is not finite")
            if wanted == "i" and name != "doc_id_D" and (array < 0).any():
                raise ValueError(f"{name} is below 0")
        counts_ML = self.k_hist_MLK.sum(-1)
        if (counts_ML != self.tokens_M[:, None]).any():
            raise ValueError("k_hist_MLK and tokens_M count different tokens")
        if (self.joint_LBK.sum(1) != self.k_hist_MLK.sum(0)).any():
            raise ValueError("joint_LBK and k_hist_MLK count different tokens")
        if (self.load_MLE.sum(-1) != self.k_hist_MLK @ np.arange(width)).any():
            raise ValueError("load_MLE and k_hist_MLK count different experts")
        if (self.kind_N >= len(KINDS)).any() or (self.k_LN >= width).any():
            raise ValueError("kind_N or k_LN has what no token is")
        if self.hash_N.size != min(int(self.limit), self.num_tokens):
            raise ValueError(f"a sample of {self.hash_N.size} of {self.num_tokens} tokens")
        if (self.doc_id_D[1:] <= self.doc_id_D[:-1]).any() or (
            self.hash_N[1:] < self.hash_N[:-1]
        ).any():
            raise ValueError("doc_id_D or hash_N is not in order")
        by_row = int(self.prompt_tokens_D.sum() + self.written_tokens_D.sum())
        if by_row != self.num_tokens:
            raise ValueError(f"documents of {by_row} tokens, not {self.num_tokens}")

    def save(self, path: Path) -> None:
        """As one file that is whole or absent. DataError where the gates gave NaN."""
        if not np.isfinite(self.entropy_sum_ML).all():
            raise DataError(
                f"{path} is not written: the entropy of some gate is not a number; look at the "
                "checkpoint, or take model.dtype=float32"
            )
        self.check()
        partial = path.with_name(f"{path.name}.tmp")
        with partial.open("wb") as file:
            np.savez_compressed(file, **vars(self))
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path, way_out: str = "run the evaluation again") -> RoutingSums:
        """DataError names the file, what is wrong in it, and the way out."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = cls(**arrays)
            found.check()
        except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile) as error:
            missing = isinstance(error, FileNotFoundError)
            reason = "is missing" if missing else f"is damaged ({error})"
            raise DataError(f"{path} {reason}: {way_out}") from None
        return found


DENSE = (
    "tokens_M",
    "load_MLE",
    "k_hist_MLK",
    "entropy_sum_ML",
    "joint_LBK",
    "transitions_LEE",
)
SAMPLE = ("hash_N", "entropy_LN", "k_LN", "kind_N")
ROWS = tuple(field.name for field in fields(RoutingSums) if field.name.endswith("_D"))
_ENTROPY_ROWS = ("entropy_prompt_D", "entropy_written_D")
_ROWS = tuple(name for name in ROWS if name not in _ENTROPY_ROWS)


def added_rows(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Columns of `ROWS`, the rows of a document added up, in the order of doc_id_D."""
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    doc_id_D, row_R = np.unique(rows.pop("doc_id_D"), return_inverse=True)
    added = {"doc_id_D": doc_id_D}
    for name, values_R in rows.items():
        added[name] = np.zeros(doc_id_D.size, values_R.dtype)
        np.add.at(added[name], row_R, values_R)
    return added


def smallest(parts: list[dict[str, np.ndarray]], limit: int) -> dict[str, np.ndarray]:
    """Arrays of `SAMPLE`: of all tokens those with the smallest hashes."""
    joined = {name: np.concatenate([part[name] for part in parts], -1) for name in parts[0]}
    first = np.argsort(joined["hash_N"], kind="stable")[:limit]
    return {name: array[..., first] for name, array in joined.items()}


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    counts = np.broadcast_to(counts, np.shape(sums))
    ratio: np.ndarray = np.divide(
        sums, counts, out=np.full(np.shape(sums), np.nan), where=counts > 0
    )
    return ratio


def _rank_correlation(joint_BK: np.ndarray) -> float | None:
    """Spearman's, ties with their average rank."""
    a_B, b_K = _centred_ranks(joint_BK.sum(1)), _centred_ranks(joint_BK.sum(0))
    scale = np.sqrt((joint_BK.sum(1) @ a_B**2) * (joint_BK.sum(0) @ b_K**2))
    return None if scale == 0 else float(np.clip(a_B @ joint_BK @ b_K / scale, -1, 1))


def _centred_ranks(counts: np.ndarray) -> np.ndarray:
    """The mean rank of each group of ties, minus that of all."""
    ranks: np.ndarray = np.cumsum(counts) - (counts - 1) / 2 - (counts.sum() + 1) / 2
    return ranks * (counts > 0)
