"""Exact-match accuracy by question kind, loss, and how tokens were routed, over all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gemoe_ds.data.bad_samples import BadSample
from gemoe_ds.data.collate import Batch
from gemoe_ds.data.sample import SampleFolder
from gemoe_ds.data.token_kinds import TOKEN_KINDS, answer_positions, kinds_of
from gemoe_ds.errors import ConfigError, DataError
from gemoe_ds.models.moe_model import MoEModel

Gather = Callable[[object], list]  # one object of each rank -> those of all ranks, on every rank
UNNAMED = "question"  # kind of a turn that the data does not name
POSITIONS = 16  # of answer tokens that are told apart; the last stands for all that follow


@dataclass
class Scores:
    """What one rank has seen; `merged` adds up the ranks. Arrays have L layers first."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    not_asked: Counter[str] = field(default_factory=Counter)  # cut, or of a sample left out
    cut_answers: int = 0  # of those
    # Row, turn, kind, and whether it was right, of every question that was asked.
    questions: list[tuple[int, int, str, bool]] = field(default_factory=list)
    bad: dict[int, BadSample] = field(default_factory=dict)  # by row
    # The sum of a sample's cross-entropies, and how many targets it has; by row.
    losses: dict[int, tuple[float, int]] = field(default_factory=dict)
    ce_sum: float = 0.0  # of all targets
    num_targets: int = 0
    num_tokens: int = 0  # valid ones
    entropy_LN: list[np.ndarray] = field(default_factory=list)
    k_LN: list[np.ndarray] = field(default_factory=list)
    is_vision_N: list[np.ndarray] = field(default_factory=list)
    load_LE: np.ndarray = field(default_factory=lambda: np.zeros((1, 1)))
    # Sums of k over tokens, and how many tokens: by TOKEN_KINDS, by place in the answer.
    kind_k_LC: np.ndarray = field(default_factory=lambda: np.zeros((1, len(TOKEN_KINDS))))
    kind_tokens_C: np.ndarray = field(default_factory=lambda: np.zeros(len(TOKEN_KINDS), int))
    answer_k_LP: np.ndarray = field(default_factory=lambda: np.zeros((1, POSITIONS)))
    answer_tokens_P: np.ndarray = field(default_factory=lambda: np.zeros(POSITIONS, int))
    samples: dict[int, tuple[float, float]] = field(default_factory=dict)  # see `Samples`

    @classmethod
    def merged(cls, parts: Iterable[Scores]) -> Scores:
        total = cls()
        for part in parts:
            total.right.update(part.right)
            total.asked.update(part.asked)
            total.not_asked.update(part.not_asked)
            total.cut_answers += part.cut_answers
            total.questions += part.questions
            total.bad |= part.bad
            total.losses |= part.losses
            total.ce_sum += part.ce_sum
            total.num_targets += part.num_targets
            total.num_tokens += part.num_tokens
            total.entropy_LN += part.entropy_LN
            total.k_LN += part.k_LN
            total.is_vision_N += part.is_vision_N
            for name in ("load_LE", "kind_k_LC", "kind_tokens_C", "answer_k_LP", "answer_tokens_P"):
                setattr(total, name, getattr(total, name) + getattr(part, name))
            total.samples |= part.samples
        return total

    @property
    def accuracy_by_kind(self) -> dict[str, float]:
        return {kind: self.right[kind] / self.asked[kind] for kind in sorted(self.asked)}

    @property
    def accuracy(self) -> float:
        """Mean over kinds, so that a rare kind weighs as much as a frequent one."""
        by_kind = self.accuracy_by_kind
        return sum(by_kind.values()) / max(len(by_kind), 1)

    @property
    def accuracy_micro(self) -> float:
        return self.right.total() / max(self.asked.total(), 1)

    @property
    def loss(self) -> float:
        """Cross-entropy of a target, each weighing the same."""
        return self.ce_sum / max(self.num_targets, 1)

    @property
    def mean_k(self) -> float:
        """Experts of a token, over all layers."""
        return float(np.mean(self.load_LE.sum(1))) / max(self.num_tokens, 1)

    def tokens(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """entropy_LN (bits), k_LN and is_vision_N of every valid token."""
        return (
            np.concatenate(self.entropy_LN, axis=1),
            np.concatenate(self.k_LN, axis=1),
            np.concatenate(self.is_vision_N),
        )


def evaluate(
    model: MoEModel,
    samples: SampleFolder,
    batches: Iterable[Batch | None],
    device: torch.device,
    gather: Gather,
    *,
    run: Callable[..., dict[str, Tensor]] | None = None,
    spare: Batch | None = None,
    keep_tokens: bool = True,
    special_ids: Set[int] = frozenset(),
) -> Scores:
    """Score every batch; None stands where a rank has run out but the others have not. Collective.

    A rank without a batch still runs the model on one that is not counted, its last or `spare`,
    because the exchange between expert-parallel ranks needs everyone. Greedy exact match without a
    generation loop: see `MoEModel._score`. `run`: the engine that holds the model, if one does.
    Without `keep_tokens` there are sums only, and there may be no question among them.
    `special_ids`: of the tokenizer. The model and the random state are left as they were.
    """
    scores, last = Scores(), spare
    with _evaluating(model, device):
        for batch in batches:
            counted = batch is not None
            current = batch if batch is not None else last
            if current is None:
                raise ConfigError("a rank has no batch at all: use fewer ranks")
            last = current
            found = (run or model)(**current.to(device).inputs, score=True)
            if counted:
                _count_answers(scores, current, found["correct_BS"].cpu(), samples)
                _count_losses(scores, current, found["ce_B"])
                _count_routing(scores, model, keep_tokens=keep_tokens)
                if keep_tokens:
                    _count_kinds(scores, current, special_ids)
                    _count_samples(scores, model, current)
    total = Scores.merged(gather(scores))
    if keep_tokens and not total.asked:
        example = next(iter(total.bad.values())).reason if total.bad else "all answers are cut"
        raise DataError(
            f"{samples.path}: none of {total.not_asked.total():,} questions can be asked, raise "
            f"data.max_length or give other samples: {example}"
        )
    return total


@contextmanager
def _evaluating(model: MoEModel, device: torch.device) -> Iterator[None]:
    ctx = model.ctx
    before, training = (ctx.trace, ctx.collect), [m for m in model.modules() if m.training]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        ctx.trace, ctx.collect = True, True
        try:
            yield
        finally:
            ctx.trace, ctx.collect = before
            for module in training:
                module.training = True


def _count_answers(scores: Scores, batch: Batch, correct_BS: Tensor, samples: SampleFolder) -> None:
    """A turn is right if every token of its answer is (the end token is not asked for)."""
    scores.bad |= {bad.row: bad for bad in batch.bad}
    is_label_BS = batch.labels_BS != -100
    for row, turns_S, right_S, label_S in zip(
        batch.rows, batch.turn_BS, correct_BS, is_label_BS, strict=True
    ):
        for index, turn in enumerate(samples[row].turns):
            answer_S = (turns_S == index) & label_S
            kind = turn.kind or UNNAMED
            if not answer_S.any():
                scores.not_asked[kind] += 1
                scores.cut_answers += row not in scores.bad
                continue
            right = bool(right_S[answer_S].all())
            scores.asked[kind] += 1
            scores.right[kind] += right
            scores.questions.append((row, index, kind, right))


def _count_losses(scores: Scores, batch: Batch, ce_B: Tensor) -> None:
    scores.ce_sum += ce_B.sum().item()
    scores.num_targets += batch.num_targets
    targets_B = (batch.labels_BS[:, 1:] != -100).sum(1)
    pairs = zip(ce_B.tolist(), targets_B.tolist(), strict=True)
    scores.losses |= dict(zip(batch.rows, pairs, strict=True))


def _count_routing(scores: Scores, model: MoEModel, *, keep_tokens: bool) -> None:
    ctx = model.ctx
    valid_T = ctx.is_valid_T
    scores.num_tokens += int(valid_T.sum())
    load = torch.stack([record.stats["tokens_per_expert"].total for record in ctx.layers])
    scores.load_LE = scores.load_LE + load.double().cpu().numpy()
    if not keep_tokens:
        return
    entropy = [record.entropy_T for record in ctx.layers]
    k = [record.k_T for record in ctx.layers]
    assert all(t is not None for t in [*entropy, *k])
    scores.entropy_LN.append(torch.stack([e[valid_T] for e in entropy]).float().cpu().numpy())  # type: ignore[index]
    scores.k_LN.append(torch.stack([e[valid_T] for e in k]).to(torch.int16).cpu().numpy())  # type: ignore[index]
    scores.is_vision_N.append(ctx.is_vision_T[valid_T].cpu().numpy())


def _count_kinds(scores: Scores, batch: Batch, special_ids: Set[int]) -> None:
    """Of the batch whose k were kept last."""
    is_valid_BS = batch.is_valid_BS.numpy()
    kind_N = kinds_of(batch, special_ids)[is_valid_BS]
    place_N = np.minimum(answer_positions(batch)[is_valid_BS], POSITIONS - 1)
    k_LN, in_answer_N = scores.k_LN[-1], place_N >= 0

    def sums(of_N: np.ndarray, columns: int, among_N: np.ndarray) -> np.ndarray:
        rows = [np.bincount(of_N[among_N], k_N[among_N], columns) for k_N in k_LN]
        return np.array(rows)

    everywhere_N = np.ones_like(in_answer_N)
    scores.kind_k_LC = scores.kind_k_LC + sums(kind_N, len(TOKEN_KINDS), everywhere_N)
    scores.kind_tokens_C = scores.kind_tokens_C + np.bincount(kind_N, minlength=len(TOKEN_KINDS))
    scores.answer_k_LP = scores.answer_k_LP + sums(place_N, POSITIONS, in_answer_N)
    scores.answer_tokens_P = scores.answer_tokens_P + np.bincount(
        place_N[in_answer_N], minlength=POSITIONS
    )


def _count_samples(scores: Scores, model: MoEModel, batch: Batch) -> None:
    """Entropy, and the mass of the best experts, of every sample that is not left out."""
    is_valid_BS = model.ctx.is_valid_T.view(len(batch.rows), -1)
    entropy, mass = [], []
    for record, spec in zip(model.ctx.layers, model.routing, strict=True):
        assert record.entropy_T is not None and record.logits_TE is not None
        scores_TE = record.logits_TE.float().softmax(-1)[:, : spec.num_experts]
        entropy.append(record.entropy_T.float())
        mass.append(scores_TE.topk(spec.top_k).values.sum(1))
    means = [
        (torch.stack(values).mean(0).view_as(is_valid_BS) * is_valid_BS).sum(1)
        / is_valid_BS.sum(1).clamp_min(1)
        for values in (entropy, mass)
    ]
    left_out = {bad.row for bad in batch.bad}
    for row, *pair in zip(batch.rows, *(mean.tolist() for mean in means), strict=True):
        if row not in left_out:
            scores.samples[row] = (pair[0], pair[1])
