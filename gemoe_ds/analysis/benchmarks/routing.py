"""How a benchmark's tokens were routed, of all its parts together: what tables and figures need.

MMLU has 57 parts, and the sums of one may take 20 MB: they are read one after the other, and only
what follows is kept. Shapes: as in routing_sums.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemoe_ds.analysis.benchmarks.files import ANSWER_AGAIN, MODE, Mode
from gemoe_ds.analysis.routing_sums import RoutingSums
from gemoe_ds.errors import DataError

ROUTING = "routing.npz"


@dataclass(frozen=True, eq=False)
class Routing:
    """Of all tokens of a benchmark; means are NaN where a kind of token has none."""

    tokens_M: np.ndarray
    mean_k_ML: np.ndarray
    mean_k_L: np.ndarray
    spearman_L: list[float | None]  # of gating entropy and k
    load_MLE: np.ndarray
    transitions_LEE: np.ndarray
    entropy_LN: np.ndarray  # of the sample
    k_LN: np.ndarray
    documents: dict[str, tuple[np.ndarray, np.ndarray]]  # by part: doc_id_D, mean_entropy_D

    @property
    def load_LE(self) -> np.ndarray:
        load_LE: np.ndarray = self.load_MLE.sum(0)
        return load_LE

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_M.sum())

    def entropy_of(self, part: str, doc_id_N: np.ndarray) -> np.ndarray:
        """The mean over the tokens of these documents; NaN where none of them counted."""
        doc_id_D, entropy_D = self.documents[part]  # ascending
        place_N = np.searchsorted(doc_id_D, doc_id_N).clip(max=doc_id_D.size - 1)
        return np.where(doc_id_D[place_N] == doc_id_N, entropy_D[place_N], np.nan)


def read_routing(folders: Sequence[Path], mode: Mode) -> Routing:
    """Of the tasks in these folders; DataError where a file is not what `mode` says."""
    documents, total = {}, None
    for folder in folders:
        part = RoutingSums.load(folder / ROUTING, ANSWER_AGAIN)
        found, expected = part.load_MLE.shape[1:], (mode.num_layers, mode.num_experts)
        if found != expected or not part.num_tokens:
            raise DataError(
                f"{folder / ROUTING} counts {part.num_tokens:,} tokens in (layers, experts) = "
                f"{found}, {MODE} has {expected}: {ANSWER_AGAIN}"
            )
        documents[folder.name] = part.doc_id_D, part.mean_entropy_D
        total = part if total is None else total + part
    assert total is not None
    names = [name for name in Routing.__dataclass_fields__ if name != "documents"]
    return Routing(**{name: getattr(total, name) for name in names}, documents=documents)
