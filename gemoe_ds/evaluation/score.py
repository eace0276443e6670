"""Exact-match accuracy by question kind, loss, and how tokens were routed, over all ranks.

Shapes: B sequences, S tokens, T = B S, N of them valid, L MoE layers, D samples.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from gemoe_ds.analysis.questions import Questions
from gemoe_ds.analysis.routing_sums import IMAGE, MAX_TOKENS, PROMPT, WRITTEN, RoutingSums
from gemoe_ds.analysis.samples import Samples
from gemoe_ds.data.bad_samples import BadSample
from gemoe_ds.data.collate import IGNORE, Batch
from gemoe_ds.data.mixture import SampleList
from gemoe_ds.data.token_kinds import TOKEN_KINDS, answer_positions, kinds_of
from gemoe_ds.engine.world import Ranks
from gemoe_ds.errors import ConfigError, DataError
from gemoe_ds.evaluation.routing import Routed, RoutingCounter, over_ranks
from gemoe_ds.models.moe_model import MoEModel

UNNAMED = "question"  # kind of a turn that the data does not name
POSITIONS = 16  # of answer tokens that are told apart; the last stands for all that follow


@dataclass(frozen=True, eq=False)
class BySample:
    """A few numbers of every sample that was not left out, sorted by row."""

    row_D: np.ndarray  # int32
    ce_D: np.ndarray  # float64: sum of the cross-entropies of
    targets_D: np.ndarray  # int32: so many targets
    mass_D: np.ndarray  # float32: see `Samples`; NaN where it was not asked for

    @classmethod
    def of(
        cls, row_D: ArrayLike, ce_D: ArrayLike, targets_D: ArrayLike, mass_D: ArrayLike
    ) -> BySample:
        """From columns in any order."""
        order = np.argsort(row_D, kind="stable")
        return cls(
            row_D=np.array(row_D, np.int32)[order],
            ce_D=np.array(ce_D, np.float64)[order],
            targets_D=np.array(targets_D, np.int32)[order],
            mass_D=np.array(mass_D, np.float32)[order],
        )


@dataclass
class Scores:
    """What one rank has seen; `merged` adds up the ranks. Arrays have L layers first."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    not_asked: Counter[str] = field(default_factory=Counter)  # cut, or of a sample left out
    cut_answers: int = 0  # of those
    bad: dict[int, BadSample] = field(default_factory=dict)  # by row
    ce_sum: float = 0.0  # of all targets
    num_targets: int = 0
    # Sums of k over tokens, and how many tokens: by TOKEN_KINDS, by place in the answer.
    kind_k_LC: np.ndarray = field(default_factory=lambda: np.zeros((1, len(TOKEN_KINDS))))
    kind_tokens_C: np.ndarray = field(default_factory=lambda: np.zeros(len(TOKEN_KINDS), int))
    answer_k_LP: np.ndarray = field(default_factory=lambda: np.zeros((1, POSITIONS)))
    answer_tokens_P: np.ndarray = field(default_factory=lambda: np.zeros(POSITIONS, int))
    questions: Questions = field(default_factory=lambda: Questions.sorted([], [], [], [], []))
    by_sample: BySample = field(default_factory=lambda: BySample.of([], [], [], []))
    routing: RoutingSums = field(default_factory=lambda: RoutingSums.empty(1, 1))

    @classmethod
    def merged(cls, parts: Sequence[Scores], routing: RoutingSums | None = None) -> Scores:
        """`routing`: that of all parts together, where it is known."""
        total = cls(
            questions=Questions.joined([part.questions for part in parts]),
            by_sample=BySample.of(
                row_D=np.concatenate([part.by_sample.row_D for part in parts]),
                ce_D=np.concatenate([part.by_sample.ce_D for part in parts]),
                targets_D=np.concatenate([part.by_sample.targets_D for part in parts]),
                mass_D=np.concatenate([part.by_sample.mass_D for part in parts]),
            ),
            routing=routing or RoutingSums.total(part.routing for part in parts),
        )
        sums = ("kind_k_LC", "kind_tokens_C", "answer_k_LP", "answer_tokens_P")
        for part in parts:
            total.right.update(part.right)
            total.asked.update(part.asked)
            total.not_asked.update(part.not_asked)
            total.bad |= part.bad
            for name in ("cut_answers", "ce_sum", "num_targets", *sums):
                setattr(total, name, getattr(total, name) + getattr(part, name))
        return total

    def over(self, ranks: Ranks, device: torch.device) -> Scores:
        """Of all ranks, on every rank. Collective."""
        routing = over_ranks(self.routing, ranks, device)
        rest = {name: value for name, value in vars(self).items() if name != "routing"}
        return Scores.merged([Scores(**part) for part in ranks.gather(rest)], routing)

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

    @property
    def num_tokens(self) -> int:
        """Valid ones."""
        return self.routing.num_tokens

    @property
    def load_LE(self) -> np.ndarray:
        """Tokens of each expert."""
        return self.routing.load_LE

    @property
    def samples(self) -> Samples:
        """Entropy, and the mass of the best experts, of every sample that is not left out."""
        by, routing = self.by_sample, self.routing
        place_D = np.searchsorted(routing.doc_id_D, by.row_D)
        entropy_D = routing.mean_entropy_D[place_D].astype(np.float32)
        return Samples(by.row_D, entropy_D, by.mass_D)


def evaluate(
    model: MoEModel,
    samples: SampleList,
    batches: Iterable[Batch | None],
    device: torch.device,
    ranks: Ranks,
    *,
    run: Callable[..., dict[str, Tensor]] | None = None,
    spare: Batch | None = None,
    in_detail: bool = True,
    special_ids: Set[int] = frozenset(),
    max_tokens: int = MAX_TOKENS,
) -> Scores:
    """Score every batch; None stands where a rank has run out but the others have not. Collective.

    A rank without a batch still runs the model on one that is not counted, its last or `spare`,
    because the exchange between expert-parallel ranks needs everyone. Greedy exact match without a
    generation loop: see `MoEModel._score`. `run`: the engine that holds the model, if one does.
    Without `in_detail` neither kinds of tokens are told apart nor the mass of the best experts is
    worked out, and there may be no question. `special_ids`: of the tokenizer. `max_tokens`: of the
    sample of tokens. The model and the random state are left as they were.
    """
    counting = _Counting(model, samples, in_detail, special_ids, max_tokens)
    last = spare
    with _evaluating(model, device):
        for batch in batches:
            current = batch if batch is not None else last
            if current is None:
                raise ConfigError("a rank has no batch at all: use fewer ranks")
            last = current
            found = (run or model)(**current.to(device).inputs, score=True)
            if batch is not None:
                counting.add(batch, found)
    total = counting.scores().over(ranks, device)
    if in_detail and not total.asked and not total.not_asked:
        raise DataError(
            f"{samples.path}: no sample asks anything: these are plain texts; give conversations, "
            "or validate a training run on them (train.eval_every), which reports their loss"
        )
    if in_detail and not total.asked:
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
        ctx.trace, ctx.collect = True, False
        try:
            yield
        finally:
            ctx.trace, ctx.collect = before
            for module in training:
                module.training = True


class _Counting:
    """What this rank sees, batch by batch. Columns of plain numbers: there may be many samples."""

    def __init__(
        self,
        model: MoEModel,
        samples: SampleList,
        in_detail: bool,
        special_ids: Set[int],
        max_tokens: int,
    ) -> None:
        self.model, self.samples = model, samples
        self.in_detail, self.special_ids = in_detail, special_ids
        self.found = Scores()
        self.routing = RoutingCounter.of(model, max_tokens)
        self.kinds: dict[str, int] = {}
        self.questions: list[array[Any]] = [array(code) for code in "ihhb"]
        self.by_sample: list[array[Any]] = [array(code) for code in "idif"]

    def add(self, batch: Batch, found: dict[str, Tensor]) -> None:
        self._add_answers(batch, found["correct_BS"].cpu())
        is_there_B = ~np.isin(batch.rows, [bad.row for bad in batch.bad])
        targets_B = (batch.labels_BS[:, 1:] != IGNORE).sum(1)
        mass_B = (
            self._mass_B(len(batch.rows)) if self.in_detail else np.full(len(targets_B), np.nan)
        )
        columns = (np.array(batch.rows), found["ce_B"].cpu().numpy(), targets_B.numpy(), mass_B)
        for column, values_B in zip(self.by_sample, columns, strict=True):
            column.extend(values_B[is_there_B].tolist())
        self.found.ce_sum += float(columns[1].sum())
        self.found.num_targets += batch.num_targets
        is_answer_BS = (batch.turn_BS >= 0) | (batch.labels_BS != IGNORE)
        kind_BS = torch.where(batch.is_vision_BS, IMAGE, torch.where(is_answer_BS, WRITTEN, PROMPT))
        routed = self.routing.add(self.model.ctx, kind_BS, np.array(batch.rows))
        if self.in_detail:
            self._add_kinds(batch, routed)

    def scores(self) -> Scores:
        row_Q, turn_Q, kind_Q, right_Q = self.questions
        self.found.questions = Questions.sorted(row_Q, turn_Q, kind_Q, right_Q, list(self.kinds))
        row_D, ce_D, targets_D, mass_D = self.by_sample
        self.found.by_sample = BySample.of(row_D, ce_D, targets_D, mass_D)
        self.found.routing = self.routing.sums
        return self.found

    def _add_answers(self, batch: Batch, correct_BS: Tensor) -> None:
        """A turn is right if every token of its answer is (the end token is not asked for)."""
        scores = self.found
        scores.bad |= {bad.row: bad for bad in batch.bad}
        is_label_BS = batch.labels_BS != IGNORE
        for row, turns_S, right_S, label_S in zip(
            batch.rows, batch.turn_BS, correct_BS, is_label_BS, strict=True
        ):
            for index, answer in enumerate(self.samples.outline(row).answers):
                answer_S = (turns_S == index) & label_S
                kind = answer.kind or UNNAMED
                if not answer_S.any():
                    scores.not_asked[kind] += 1
                    scores.cut_answers += row not in scores.bad
                    continue
                right = bool(right_S[answer_S].all())
                scores.asked[kind] += 1
                scores.right[kind] += right
                place = self.kinds.setdefault(kind, len(self.kinds))
                for column, value in zip(self.questions, (row, index, place, right), strict=True):
                    column.append(value)

    def _add_kinds(self, batch: Batch, routed: Routed) -> None:
        """Of the tokens that were counted."""
        scores = self.found
        kind_N = kinds_of(batch, self.special_ids).reshape(-1)[routed.place_N]
        place_N = np.minimum(answer_positions(batch), POSITIONS - 1).reshape(-1)[routed.place_N]
        in_answer_N = place_N >= 0

        def sums(of_N: np.ndarray, columns: int, k_LN: np.ndarray) -> np.ndarray:
            return np.array([np.bincount(of_N, k_N, columns) for k_N in k_LN])

        scores.kind_k_LC = scores.kind_k_LC + sums(kind_N, len(TOKEN_KINDS), routed.k_LN)
        scores.kind_tokens_C = scores.kind_tokens_C + np.bincount(
            kind_N, minlength=len(TOKEN_KINDS)
        )
        place_N, k_LN = place_N[in_answer_N], routed.k_LN[:, in_answer_N]
        scores.answer_k_LP = scores.answer_k_LP + sums(place_N, POSITIONS, k_LN)
        scores.answer_tokens_P = scores.answer_tokens_P + np.bincount(place_N, minlength=POSITIONS)

    def _mass_B(self, num_sequences: int) -> np.ndarray:
        """The share of the scores that the best experts hold, mean over layers and valid tokens."""
        ctx, mass = self.model.ctx, []
        for record, spec in zip(ctx.layers, self.model.routing, strict=True):
            assert record.logits_TE is not None
            scores_TE = record.logits_TE.float().softmax(-1)[:, : spec.num_experts]
            mass.append(scores_TE.topk(spec.top_k).values.sum(1))
        is_valid_BS = ctx.is_valid_T.view(num_sequences, -1)
        mass_BS = torch.stack(mass).mean(0).view_as(is_valid_BS) * is_valid_BS
        mass_B: np.ndarray = (mass_BS.sum(1) / is_valid_BS.sum(1).clamp_min(1)).cpu().numpy()
        return mass_B
