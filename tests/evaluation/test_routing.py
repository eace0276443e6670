"""Sums over tokens against the plain way: keep every token, and count at the end."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch

from gemoe_ds.analysis.routing_sums import (
    IMAGE,
    KINDS,
    PROMPT,
    WRITTEN,
    RoutingSums,
    entropy_bins,
)
from gemoe_ds.engine.world import ALONE, Ranks
from gemoe_ds.errors import DataError
from gemoe_ds.evaluation.generate import generate
from gemoe_ds.evaluation.routing import RoutingCounter, over_ranks
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.moe.context import TokenContext
from tests.analysis.evaluations import same_sums
from tests.evaluation.test_generate import fake_prompts
from tests.tiny import make_model, write_base

LAYERS, EXPERTS = 3, 5


@dataclass
class Token:
    """What is known of one; lists have an entry a layer."""

    doc: int
    index: int
    kind: int
    entropy: list[float]
    experts: list[list[int]]
    heaviest: list[int]


def forward(kind_BS: torch.Tensor, seed: int, most: int = EXPERTS) -> TokenContext:
    """A context as routers leave it: kind -2 is padding, whose records are as random."""
    g = torch.Generator().manual_seed(seed)
    ctx = TokenContext(LAYERS)
    ctx.begin(kind_BS > -2, kind_BS == IMAGE)
    tokens = kind_BS.numel()
    for layer, record in enumerate(ctx.layers):
        k_T = torch.randint(0, most + 1, (tokens,), generator=g)
        open_ = EXPERTS - (layer == 1)  # one expert of this layer is idle
        ranks = torch.rand(tokens, EXPERTS, generator=g)
        ranks[:, open_:] = -1
        order = ranks.argsort(1, descending=True).argsort(1)
        record.mask_TE = (order < k_T[:, None]) & (ranks >= 0) & ctx.is_valid_T[:, None]
        record.k_T = record.mask_TE.sum(1)
        record.weights_TE = torch.rand(tokens, EXPERTS, generator=g)
        record.entropy_T = torch.rand(tokens, generator=g) * math.log2(EXPERTS)
    ctx.end()
    return ctx


def tokens_of(ctx: TokenContext, kind_BS: torch.Tensor, docs: list[int], index: int) -> list[Token]:
    found = []
    for t, kind in enumerate(kind_BS.flatten().tolist()):
        if kind < 0:
            continue
        experts = [record.mask_TE[t].nonzero().flatten().tolist() for record in ctx.layers]
        heaviest = [
            max(some, key=lambda e, r=record: r.weights_TE[t, e].item(), default=-1)
            for some, record in zip(experts, ctx.layers, strict=True)
        ]
        entropy = [record.entropy_T[t].item() for record in ctx.layers]
        found.append(Token(docs[t // kind_BS.shape[1]], index, kind, entropy, experts, heaviest))
    return found


def check(sums: RoutingSums, tokens: list[Token]) -> None:
    """Every number of the sums is what a walk over all tokens gives."""
    sums.check()
    load, hist, joint, moves = (defaultdict(int) for _ in range(4))
    entropy, rows = defaultdict(float), defaultdict(lambda: [0, 0, 0, 0, 0.0, 0.0])
    for token in tokens:
        row = rows[token.doc]
        row[token.kind == WRITTEN] += 1
        for layer in range(LAYERS):
            k, h = len(token.experts[layer]), token.entropy[layer]
            for expert in token.experts[layer]:
                load[token.kind, layer, expert] += 1
            hist[token.kind, layer, k] += 1
            entropy[token.kind, layer] += h
            joint[layer, int(entropy_bins(np.array([h]), EXPERTS)[0]), k] += 1
            if layer and token.heaviest[layer] >= 0 and token.heaviest[layer - 1] >= 0:
                moves[layer - 1, token.heaviest[layer - 1], token.heaviest[layer]] += 1
            row[2 + (token.kind == WRITTEN)] += k
            row[4 + (token.kind == WRITTEN)] += h
    assert sums.tokens_M.tolist() == [sum(t.kind == m for t in tokens) for m in range(len(KINDS))]
    for array, counted in (
        (sums.load_MLE, load),
        (sums.k_hist_MLK, hist),
        (sums.joint_LBK, joint),
        (sums.transitions_LEE, moves),
    ):
        found = {tuple(map(int, at)): int(array[tuple(at)]) for at in np.argwhere(array)}
        assert found == dict(counted)
    for at, total in entropy.items():
        assert sums.entropy_sum_ML[at] == pytest.approx(total)
    assert sums.doc_id_D.tolist() == sorted(rows)
    for d, doc in enumerate(sums.doc_id_D.tolist()):
        prompt, written, k_prompt, k_written, h_prompt, h_written = rows[doc]
        assert (sums.prompt_tokens_D[d], sums.written_tokens_D[d]) == (prompt, written)
        assert (sums.k_prompt_D[d], sums.k_written_D[d]) == (k_prompt, k_written)
        assert sums.entropy_prompt_D[d] == pytest.approx(h_prompt)
        assert sums.entropy_written_D[d] == pytest.approx(h_written)
        mean = (h_prompt + h_written) / (prompt + written) / LAYERS
        assert sums.mean_entropy_D[d] == pytest.approx(mean)


def kinds(rng: np.random.Generator, sequences: int, length: int) -> torch.Tensor:
    """Ragged, padded right or left; some tokens are valid and not to be counted (-1)."""
    kind = rng.choice([IMAGE, PROMPT, WRITTEN, -1], (sequences, length), p=[0.3, 0.3, 0.3, 0.1])
    for row in kind:
        row[: int(rng.random() * length)] = -2
        if rng.random() < 0.5:
            row[:] = row[::-1].copy()
    return torch.from_numpy(kind)


def test_sums_are_those_of_a_walk_over_all_tokens():
    rng, tokens = np.random.default_rng(0), []
    counter = RoutingCounter(LAYERS, EXPERTS)
    shapes = [(1, 1), (4, 9), (0, 5), (3, 0), (2, 30), (5, 1), (6, 12)]
    for seed, (sequences, length) in enumerate(shapes):
        kind_BS = kinds(rng, sequences, length)
        if seed == 5:
            kind_BS[:] = -2  # nobody is left
        docs = rng.integers(-3, 6, sequences).tolist()
        ctx = forward(kind_BS, seed, most=[1, 2, EXPERTS, 2][seed % 4])  # later ones widen K
        counter.add(ctx, kind_BS, np.array(docs), index_B=seed)
        tokens += tokens_of(ctx, kind_BS, docs, seed)
        check(counter.sums, tokens)
    assert {len(token.experts[0]) for token in tokens} == set(range(EXPERTS + 1))  # k = 0, too
    sums = counter.sums
    assert sums.idle_experts_L == [0, 1, 0] and sums.load_max_over_mean_L[1] > 1.2
    assert sums.mean_k_L == pytest.approx(
        [np.mean([len(t.experts[n]) for t in tokens]) for n in range(LAYERS)]
    )


@cache
def kinds_of_document(doc: int) -> torch.Tensor:
    rng = np.random.default_rng(doc)
    return kinds(rng, 1, int(rng.integers(1, 12)))


@cache
def routed_alone(doc: int) -> TokenContext:
    return forward(kinds_of_document(doc), doc)


def parts_of(batches: list[list[int]], limit: int) -> RoutingSums:
    """Documents 0..39 of ragged lengths, in these batches: the same tokens whatever they are."""
    counter = RoutingCounter(LAYERS, EXPERTS, limit)
    for docs in batches:
        each = [kinds_of_document(doc) for doc in docs]
        length = max((kind.shape[1] for kind in each), default=0)
        whole = TokenContext(LAYERS)
        pad = [
            torch.nn.functional.pad(kind, (0, length - kind.shape[1]), value=-2) for kind in each
        ]
        kind_BS = torch.cat(pad) if pad else torch.zeros(0, 0, dtype=torch.long)
        whole.begin(kind_BS > -2, kind_BS == IMAGE)
        for layer, record in enumerate(whole.layers):
            for name in ("mask_TE", "weights_TE", "entropy_T", "k_T"):
                rows = []
                for doc in docs:
                    row = getattr(routed_alone(doc).layers[layer], name)
                    more = length - len(row)
                    rows.append(torch.cat([row, row.new_zeros(more, *row.shape[1:])]))
                empty = torch.zeros(0, EXPERTS) if name.endswith("TE") else torch.zeros(0)
                setattr(
                    record,
                    name,
                    torch.cat(rows) if rows else empty.bool() if name == "mask_TE" else empty,
                )
        whole.end()
        counter.add(whole, kind_BS, np.array(docs, np.int64))
        if len(docs) % 2:
            counter.sums.check()  # what was pending is in its place, half the time
    return counter.sums


@pytest.mark.parametrize("limit", [0, 50, 10_000])
def test_nothing_depends_on_batches_order_ranks_or_a_resume(limit, tmp_path):
    everyone = list(range(40))
    reference = parts_of([everyone], limit)
    assert reference.hash_N.size == min(limit, reference.num_tokens)
    shuffled = np.random.default_rng(1).permutation(40).tolist()
    one_by_one = parts_of([[doc] for doc in shuffled], limit)
    same_sums(one_by_one, reference)
    ranks = [
        parts_of([everyone[n::3][i : i + 4] for i in range(0, 14, 4)], limit) for n in range(3)
    ]
    ranks.append(parts_of([[]], limit))  # one that had nothing to do
    same_sums(RoutingSums.total(ranks), reference)
    for before in (0, 17, 40):  # a run that was cut, and went on
        parts_of([shuffled[:before]], limit).save(tmp_path / "routing.npz")
        rest = parts_of([[doc] for doc in shuffled[before:]], limit)
        same_sums(RoutingSums.load(tmp_path / "routing.npz") + rest, reference)
    for rank in over_all(ranks):
        same_sums(rank, reference)


def over_all(parts: list[RoutingSums]) -> list[RoutingSums]:
    """`over_ranks` of all ranks at once, each in a thread."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    met, board = Barrier(len(parts)), {}

    def of(rank: int) -> RoutingSums:
        def gather(value: object) -> list:
            board[rank] = value
            met.wait(10)
            found = [board[n] for n in range(len(parts))]
            met.wait(10)
            return found

        def add_up(tensor: torch.Tensor) -> None:
            tensor.copy_(sum(gather(tensor.clone())))

        return over_ranks(parts[rank], Ranks(gather, add_up), torch.device("cpu"))

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(of, range(len(parts))))


def test_a_rank_alone_keeps_what_it_has():
    sums = parts_of([[1, 2], [3]], 20)
    same_sums(over_ranks(sums, ALONE, torch.device("cpu")), sums)


def test_the_sample_is_drawn_evenly():
    """20 documents, 300 tokens each in 3 requests; every kind and place is as likely."""
    counter = RoutingCounter(LAYERS, EXPERTS, 3000)
    kind_BS = torch.tensor([[IMAGE] * 40 + [PROMPT] * 30 + [WRITTEN] * 30] * 20)
    for index in range(3):
        counter.add(forward(kind_BS, index), kind_BS, np.arange(20), index_B=index)
    sums = counter.sums
    assert len(np.unique(sums.hash_N)) == 3000
    share_M = np.bincount(sums.kind_N) / 3000
    assert np.allclose(share_M, [0.4, 0.3, 0.3], atol=0.03)  # 3 standard errors


def test_a_token_at_a_time_is_as_all_at_once():
    """Written one by one, as generation does it; the hash goes by the place in the answer."""
    kind_BS = torch.full((2, 6), WRITTEN)
    ctx, doc_B = forward(kind_BS, 0), np.array([4, 9])
    at_once = RoutingCounter(LAYERS, EXPERTS)
    at_once.add(ctx, kind_BS, doc_B)
    stepwise = RoutingCounter(LAYERS, EXPERTS)
    for step in range(6):
        one, at = TokenContext(LAYERS), [step, 6 + step]
        one.begin(None, torch.zeros(2, 1, dtype=torch.bool))
        for record, whole in zip(one.layers, ctx.layers, strict=True):
            for name in ("mask_TE", "weights_TE", "entropy_T", "k_T"):
                setattr(record, name, getattr(whole, name)[at])
        stepwise.add(one, kind_BS[:, step : step + 1], doc_B, first=step)
    same_sums(stepwise.sums, at_once.sums)


@pytest.mark.parametrize(
    "router, options", [("gemoe", {}), ("moepp", {"k": 1, "zero": 8, "free_rows": "copies"})]
)
def test_what_is_written_is_counted_until_it_ends(router, options, tmp_path):
    """Prompts of two lengths, padded on the left; the first answer ends early. Each alone gives the
    same, of a forward over its whole text."""
    model = make_model(write_base(tmp_path), router, options).eval()
    ids_BS = torch.randint(6, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    is_vision_BS = torch.zeros(3, 7, dtype=torch.bool)
    is_vision_BS[:, 2:5] = True
    prompts = replace(fake_prompts(ids_BS, [7, 4, 0]), is_vision_BS=is_vision_BS)
    counter, doc_B = RoutingCounter.of(model), np.array([7, 5, 3])
    written = generate(
        model,
        prompts,
        max_new_tokens=[2, 6, 6],
        end_ids=set(),
        count=False,
        after_forward=counter.while_writing(model.ctx, is_vision_BS, doc_B, index_B=2),
    )
    assert [len(token_ids) for token_ids in written.token_ids] == [2, 6, 0]
    expected = RoutingCounter.of(model)
    model.ctx.trace = True
    for row, start in ((0, 0), (1, 3)):
        ids = torch.tensor([[*ids_BS[row, start:].tolist(), *written.token_ids[row][:-1]]])
        kind_BS = torch.full_like(ids, WRITTEN)
        kind_BS[0, : 7 - start] = torch.where(is_vision_BS[row, start:], IMAGE, PROMPT)
        with torch.no_grad():
            model.hidden(ModelInputs(ids, torch.ones_like(ids).bool(), kind_BS == IMAGE))
        expected.add(model.ctx, kind_BS, doc_B[row : row + 1], index_B=2)
    assert expected.sums.tokens_M.tolist() == [5, 6, 6]
    for name, array in vars(expected.sums).items():
        found = getattr(counter.sums, name)
        if name == "joint_LBK":  # sums of floats in another order: a bin further, now and then
            found, array = found.sum(1), array.sum(1)
        assert np.allclose(found, array, rtol=1e-5, atol=1e-5), name
    if router == "moepp":
        assert counter.sums.k_hist_MLK[..., 0].any()  # nothing but free experts


def test_counts_are_exact_under_autocast():
    kind_BS, sums = torch.full((3, 999), PROMPT), []  # odd numbers that bfloat16 has not
    ctx = forward(kind_BS, 0)
    for enabled in (False, True):
        counter = RoutingCounter(LAYERS, EXPERTS)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            counter.add(ctx, kind_BS, np.arange(3))
        sums.append(counter.sums)
    same_sums(*sums)


def test_gates_that_give_nan_are_counted_and_not_written(tmp_path):
    """As validation meets them in a run that diverges."""
    kind_BS = torch.full((1, 4), PROMPT)
    ctx = forward(kind_BS, 0)
    ctx.layers[0].entropy_T[1] = torch.nan
    counter = RoutingCounter(LAYERS, EXPERTS)
    counter.add(ctx, kind_BS, np.array([0]))
    sums = counter.sums
    assert np.isnan(sums.mean_entropy_L[0]) and sums.mean_entropy_L[1] > 0
    assert np.isfinite(sums.mean_k_L).all() and sums.joint_LBK.sum() == 4 * LAYERS
    with pytest.raises(DataError, match="routing.npz is not written: the entropy of some gate"):
        sums.save(tmp_path / "routing.npz")
    assert not list(tmp_path.iterdir())


def test_a_total_is_no_view_of_its_part():
    sums = parts_of([[1]], 20)
    total, before = RoutingSums.total([sums]), sums.load_MLE.copy()
    total.load_MLE += 1
    assert np.array_equal(sums.load_MLE, before)


def test_a_context_that_did_not_trace_is_refused():
    ctx = TokenContext(LAYERS)
    with pytest.raises(RuntimeError, match="ctx.trace"):
        RoutingCounter(LAYERS, EXPERTS).add(ctx, torch.zeros(0, 0), np.zeros(0))
