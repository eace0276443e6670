"""Counts how the tokens of forwards were routed, into `RoutingSums`; one copy a forward waits.

    counter, model.ctx.trace = RoutingCounter.of(model), True
    for ...:
        model(...)
        counter.add(model.ctx, kind_BS, doc_B)
    counter.sums.save(path)

Shapes: B sequences, S tokens of each in a forward, T = B S, N of them that count, M kinds of
tokens, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from gemoe_ds.analysis.routing_sums import (
    IMAGE,
    KINDS,
    MAX_TOKENS,
    PROMPT,
    ROWS,
    SAMPLE,
    WRITTEN,
    RoutingSums,
    added_rows,
    entropy_bins,
    smallest,
)
from gemoe_ds.engine.world import Ranks
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.context import TokenContext

# Entropies are summed as multiples of 1 / 2^20 bit, up to 2^33 bits: exactly, in whatever order.
_EXACT = 2**20
_PENDING = 20_000  # rows or tokens that are kept before they are put in their place


@dataclass(frozen=True)
class Routed:
    """The tokens of one forward that count, sequence by sequence."""

    place_N: np.ndarray  # 0..T - 1
    kind_N: np.ndarray
    entropy_LN: np.ndarray  # float32, bits
    k_LN: np.ndarray
    heaviest_LN: np.ndarray  # the expert with the largest weight; -1 where k is 0
    load_MLE: np.ndarray


def routed(ctx: TokenContext, kind_BS: Tensor) -> Routed:
    """Of the forward that has ended: valid tokens whose kind is not below 0. Waits once."""
    device = ctx.is_valid_T.device
    kind_T = kind_BS.reshape(-1).to(device, torch.int32, non_blocking=True)
    kind_T = torch.where(ctx.is_valid_T, kind_T, -1)
    is_kind_MT = (kind_T == torch.arange(len(KINDS), device=device)[:, None]).float()
    parts, experts = [kind_T], 0
    for record in ctx.layers:
        if record.mask_TE is None:
            raise RuntimeError("routing is counted where ctx.trace was on during the forward")
        assert record.entropy_T is not None and record.weights_TE is not None
        mask_TE, experts = record.mask_TE, record.mask_TE.shape[1]
        most_T, best_T = torch.where(mask_TE, record.weights_TE, -torch.inf).max(1)
        best_T = torch.where(most_T > -torch.inf, best_T, -1)
        with torch.autocast(device.type, enabled=False):
            load_ME = is_kind_MT @ mask_TE.float()  # exact: fewer than 2^24 tokens
        numbers = [record.entropy_T.float().view(torch.int32), record.k_T, best_T, load_ME]
        parts += [x.to(torch.int32).reshape(-1) for x in numbers]  # type: ignore[union-attr]
    packed = torch.cat(parts).cpu().numpy()  # the one copy, and wait
    tokens = kind_T.numel()
    kind, layers = packed[:tokens], packed[tokens:].reshape(len(ctx.layers), -1)
    place_N = np.flatnonzero(kind >= 0)
    entropy_LN, k_LN, best_LN = (layers[:, n * tokens :][:, place_N] for n in range(3))
    load_LME = layers[:, 3 * tokens :].reshape(len(ctx.layers), len(KINDS), experts)
    return Routed(
        place_N=place_N,
        kind_N=kind[place_N],
        entropy_LN=entropy_LN.view(np.float32),
        k_LN=k_LN,
        heaviest_LN=best_LN,
        load_MLE=load_LME.swapaxes(0, 1),
    )


class RoutingCounter:
    """Adds up what forwards of one model have routed."""

    def __init__(self, num_layers: int, num_experts: int, limit: int = MAX_TOKENS) -> None:
        self._sums = RoutingSums.empty(num_layers, num_experts, limit)
        self._pending: dict[str, list[dict[str, np.ndarray]]] = {"rows": [], "sample": []}
        self._num_pending = 0

    @classmethod
    def of(cls, model: MoEModel, limit: int = MAX_TOKENS) -> RoutingCounter:
        return cls(len(model.routing), model.routing[0].num_experts, limit)

    @property
    def sums(self) -> RoutingSums:
        """Of all forwards so far, until the next one."""
        sums, parts = self._sums, self._pending
        for names, key in ((ROWS, "rows"), (SAMPLE, "sample")):
            parts[key].append({name: getattr(sums, name) for name in names})
        vars(sums).update(added_rows(parts["rows"]), **smallest(parts["sample"], int(sums.limit)))
        self._pending, self._num_pending = {"rows": [], "sample": []}, 0
        return sums

    def add(
        self,
        ctx: TokenContext,
        kind_BS: Tensor | np.ndarray,
        doc_B: np.ndarray,
        *,
        index_B: np.ndarray | int = 0,
        first: int = 0,
    ) -> Routed:
        """Count the forward that has just ended; padding, and what is of a kind below 0, is not.

        Args:
            ctx: the model's.
            kind_BS: IMAGE, PROMPT or WRITTEN (analysis/routing_sums.py) of every token.
            doc_B: integers, the document that each sequence is of.
            index_B: tells sequences of one document apart, so that every token has its own hash.
            first: how many written tokens of each sequence went through the model before.
        """
        kind_BS = torch.as_tensor(kind_BS)
        num_sequences, length = kind_BS.shape
        found = routed(ctx, kind_BS)
        sequence_N, is_written_N = found.place_N // max(length, 1), found.kind_N == WRITTEN
        doc_B = np.asarray(doc_B, np.int64)
        index_B = np.broadcast_to(np.asarray(index_B, np.int64), num_sequences)
        place_N = first * is_written_N + _place_within(2 * sequence_N + is_written_N)
        hash_N = _hash(doc_B[sequence_N], index_B[sequence_N], 2 * place_N + is_written_N)
        exact_LN = (found.entropy_LN.astype(float) * _EXACT).round() / _EXACT
        self._count(found, exact_LN)
        self._count_rows(found, exact_LN.sum(0), sequence_N, is_written_N, doc_B)
        self._keep(found, hash_N)
        return found

    def while_writing(
        self,
        ctx: TokenContext,
        is_vision_BS: Tensor,
        doc_B: np.ndarray,
        index_B: np.ndarray | int = 0,
    ) -> Callable[[], Routed]:
        """`after_forward` of one call of `generate`, whose prompts have these images."""
        prompt_BS, forwards = torch.where(is_vision_BS, IMAGE, PROMPT), count()

        def add() -> Routed:
            forward = next(forwards)
            written_BS = torch.full_like(prompt_BS[:, :1], WRITTEN)
            kind_BS = written_BS if forward else prompt_BS
            return self.add(ctx, kind_BS, doc_B, index_B=index_B, first=max(forward - 1, 0))

        return add

    def _count(self, found: Routed, exact_LN: np.ndarray) -> None:
        sums, kind_N, k_LN = self._sums, found.kind_N, found.k_LN
        width = int(k_LN.max(initial=0)) + 1
        if width > sums.k_hist_MLK.shape[-1]:
            vars(sums).update(sums.widened(width))
        num_layers, num_experts = sums.load_LE.shape
        layer_L1 = np.arange(num_layers)[:, None]
        sums.tokens_M += np.bincount(kind_N, minlength=len(KINDS))
        sums.load_MLE += found.load_MLE
        for kind in range(len(KINDS)):
            sums.entropy_sum_ML[kind] += exact_LN[:, kind_N == kind].sum(1)
        _increment(sums.k_hist_MLK, kind_N, layer_L1, k_LN)
        _increment(sums.joint_LBK, layer_L1, entropy_bins(found.entropy_LN, num_experts), k_LN)
        before, after = found.heaviest_LN[:-1], found.heaviest_LN[1:]
        layer, token = np.nonzero((before >= 0) & (after >= 0))
        _increment(sums.transitions_LEE, layer, before[layer, token], after[layer, token])

    def _count_rows(
        self,
        found: Routed,
        entropy_N: np.ndarray,
        sequence_N: np.ndarray,
        is_written_N: np.ndarray,
        doc_B: np.ndarray,
    ) -> None:
        k_N = found.k_LN.sum(0)
        rows = {"doc_id_D": doc_B}
        for name, chosen_N in (("prompt", ~is_written_N), ("written", is_written_N)):
            of_B, size = sequence_N[chosen_N], doc_B.size
            rows[f"{name}_tokens_D"] = np.bincount(of_B, minlength=size)
            rows[f"k_{name}_D"] = np.bincount(of_B, k_N[chosen_N], size).astype(np.int64)
            rows[f"entropy_{name}_D"] = np.bincount(of_B, entropy_N[chosen_N], size)
        there_B = rows["prompt_tokens_D"] + rows["written_tokens_D"] > 0
        self._pend("rows", {name: array[there_B] for name, array in rows.items()})

    def _keep(self, found: Routed, hash_N: np.ndarray) -> None:
        sums = self._sums
        is_full = sums.hash_N.size == sums.limit
        chosen_N = (
            hash_N < sums.hash_N[-1] if is_full and sums.limit else np.ones(len(hash_N), bool)
        )
        self._pend(
            "sample",
            {
                "hash_N": hash_N[chosen_N],
                "entropy_LN": found.entropy_LN[:, chosen_N],
                "k_LN": found.k_LN[:, chosen_N].astype(np.int16),
                "kind_N": found.kind_N[chosen_N].astype(np.int8),
            },
        )

    def _pend(self, what: str, arrays: dict[str, np.ndarray]) -> None:
        """Until there are many: to put them in their place takes a sort of all that are there."""
        self._pending[what].append(arrays)
        self._num_pending += next(iter(arrays.values())).size
        if self._num_pending > _PENDING:
            _ = self.sums


def over_ranks(sums: RoutingSums, ranks: Ranks, device: torch.device) -> RoutingSums:
    """What all ranks have counted. Collective: sums are reduced, and of the samples only those
    tokens travel that stay."""
    width = max(ranks.gather(sums.k_hist_MLK.shape[-1]))
    whole = sums.widened(width)
    dense: dict[str, np.ndarray] = {}
    for kind in (np.dtype(np.int64), np.dtype(np.float64)):
        names = [name for name, array in whole.items() if array.dtype == kind]
        joined = np.concatenate([whole[name].reshape(-1) for name in names])
        flat = torch.from_numpy(joined).to(device)
        ranks.sum(flat)
        ends = np.cumsum([whole[name].size for name in names])[:-1]
        for name, part in zip(names, np.split(flat.cpu().numpy(), ends), strict=True):
            dense[name] = part.reshape(whole[name].shape)
    limit = int(sums.limit)
    hashes = np.sort(np.concatenate(ranks.gather(sums.hash_N)))[:limit]
    stays_N = sums.hash_N <= (hashes[-1] if len(hashes) else 0)
    sample = ranks.gather({name: getattr(sums, name)[..., stays_N] for name in SAMPLE})
    rows = ranks.gather({name: getattr(sums, name) for name in ROWS})
    return RoutingSums(limit=sums.limit, **dense, **smallest(sample, limit), **added_rows(rows))


def _increment(counts: np.ndarray, *places: np.ndarray) -> None:
    """counts[places] += 1, once for every entry of the broadcast places."""
    flat = np.ravel_multi_index(np.broadcast_arrays(*places), counts.shape)
    np.add.at(counts.reshape(-1), flat.reshape(-1), 1)


def _place_within(group_N: np.ndarray) -> np.ndarray:
    """How many of the same group come before."""
    order = np.argsort(group_N, kind="stable")
    counts = np.bincount(group_N)
    place_N = np.empty(group_N.size, np.int64)
    place_N[order] = np.arange(group_N.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return place_N


def _hash(*numbers: np.ndarray) -> np.ndarray:
    """Of integers, uint64, as good as drawn at random (the mixing of SplitMix64)."""
    hash_N = np.zeros(numbers[0].shape, np.uint64)
    for number_N in numbers:
        hash_N = hash_N + number_N.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        hash_N = (hash_N ^ (hash_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        hash_N = (hash_N ^ (hash_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hash_N ^= hash_N >> np.uint64(31)
    return hash_N
