"""Log-likelihoods of continuations: a context that several have is read once.

A context is a row of a forward. Continuations of one token are looked up at its end; a single
longer one stands behind it in the same row; several are rows of a second forward, which attends to
the keys and values of the first. Logits are worked out only where a token is scored, in float32.
Shapes: B rows, S tokens, D model, V vocabulary, R rows of the second forward, U places whose logits
are needed, N scored tokens, P continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gemoe_ds.analysis.routing_sums import IMAGE, PROMPT, WRITTEN
from gemoe_ds.data.collate import Collator, Encoded
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.kv_cache import DecodeState
from gemoe_ds.models.moe_model import MoEModel

Count = Callable[[Tensor, list[int], list[int]], object]  # kind_BS, doc_B, index_B of a forward
Scored = tuple[float, bool]  # the log-likelihood, and whether greedy decoding would have written it

_AT_ONCE = 1024  # places whose logits there are at a time
CHEAP = 8  # tokens of a context that is read again sooner than a second forward is begun


@dataclass
class Context:
    """What continuations follow: token ids, and images where the prompt has some."""

    doc_id: int
    prompt: Encoded
    # Token ids, at least one; the numbers are the caller's, different ones in all of a document.
    continuations: dict[int, Sequence[int]] = field(default_factory=dict)

    @property
    def is_shared(self) -> bool:
        """Whether continuations need a forward of their own."""
        return sum(len(ids) > 1 for ids in self.continuations.values()) > 1

    @property
    def longest(self) -> int:
        """Tokens that are read in one row, keys and values of the context among them."""
        return len(self.prompt.input_ids) + max(map(len, self.continuations.values())) - 1

    def rows(self, may_share: bool) -> list[Context]:
        """Itself, or one for each continuation where it is short or may not be shared."""
        if not self.is_shared or (may_share and len(self.prompt.input_ids) > CHEAP):
            return [self]
        return [
            Context(self.doc_id, self.prompt, {index: ids})
            for index, ids in self.continuations.items()
        ]


@dataclass
class _Places:
    """Where which tokens are scored in the hidden states of a forward."""

    row_N: list[int] = field(default_factory=list)
    column_N: list[int] = field(default_factory=list)
    token_N: list[int] = field(default_factory=list)
    pair_N: list[int] = field(default_factory=list)

    def add(self, row: int, first: int, tokens: Sequence[int], pair: int) -> None:
        number = len(tokens)
        self.row_N += [row] * number
        self.column_N += range(first, first + number)
        self.token_N += tokens
        self.pair_N += [pair] * number


@torch.no_grad()
def log_likelihoods(
    model: MoEModel,
    collator: Collator,
    contexts: Sequence[Context],
    device: torch.device,
    count: Count,
    *,
    shared: bool,
) -> list[dict[int, Scored]]:
    """Of every context its continuations, in evaluation mode. Collective where ranks share experts.

    `shared`: there is a second forward, which the contexts that are shared need; a rank may have
    nothing for it, or no context at all.
    """
    assert shared or not any(context.is_shared for context in contexts)
    rows = _Rows(contexts)
    past = DecodeState() if shared else None
    found = _forward(model, collator, rows.first, rows.places, past, device, count)
    if past is not None:
        past.select(torch.tensor(rows.row_R or [0], device=device))
        more = _forward(model, collator, rows.second, rows.places_R, past, device, count)
        found = {pair: found.get(pair, _NOTHING) + more.get(pair, _NOTHING) for pair in rows.pairs}
    scored: list[dict[int, Scored]] = [{} for _ in contexts]
    for pair, (context, index) in enumerate(rows.pairs.values()):
        total = found[pair]
        scored[context][index] = (total.log_likelihood, total.is_greedy)
    return scored


@dataclass(frozen=True)
class _Sum:
    log_likelihood: float
    is_greedy: bool

    def __add__(self, other: _Sum) -> _Sum:
        total = self.log_likelihood + other.log_likelihood
        return _Sum(total, self.is_greedy and other.is_greedy)


_NOTHING = _Sum(0.0, True)


@dataclass
class _Row:
    """Token ids of a forward, of which the last `written` are of a continuation."""

    doc_id: int
    index: int
    encoded: Encoded
    written: int


class _Rows:
    """The rows of both forwards, and what is scored in them."""

    def __init__(self, contexts: Sequence[Context]) -> None:
        self.first: list[_Row] = []
        self.second: list[_Row] = []
        self.row_R: list[int] = []  # the row of the first forward that each of the second follows
        self.places, self.places_R = _Places(), _Places()
        self.pairs: dict[int, tuple[int, int]] = {}
        for row, context in enumerate(contexts):
            self._add(row, context)

    def _add(self, row: int, context: Context) -> None:
        prompt = context.prompt
        end = len(prompt.input_ids)
        behind: Sequence[int] = ()
        for index, ids in context.continuations.items():
            pair = len(self.pairs)
            self.pairs[pair] = (row, index)
            if len(ids) > 1 and context.is_shared:
                self.places.add(row, end - 1, ids[:1], pair)
                self.places_R.add(len(self.second), 0, ids[1:], pair)
                self.row_R.append(row)
                encoded = Encoded(prompt.row, prompt.id)
                encoded.add(list(ids[:-1]))
                self.second.append(_Row(context.doc_id, 2 * index + 1, encoded, len(ids) - 1))
            else:
                self.places.add(row, end - 1, ids, pair)
                behind = ids[:-1] or behind
        index = 2 * min(context.continuations)  # tells the rows of a document apart
        self.first.append(_Row(context.doc_id, index, _followed(prompt, behind), len(behind)))


def _followed(prompt: Encoded, ids: Sequence[int]) -> Encoded:
    longer = Encoded(prompt.row, prompt.id, bad=prompt.bad)
    for name in ("input_ids", "labels", "turn", "is_vision", "feature"):
        setattr(longer, name, list(getattr(prompt, name)))
    longer.images = list(prompt.images)
    longer.add(list(ids))
    return longer


def _forward(
    model: MoEModel,
    collator: Collator,
    rows: list[_Row],
    places: _Places,
    past: DecodeState | None,
    device: torch.device,
    count: Count,
) -> dict[int, _Sum]:
    """By pair. Without rows a silent one, which counts nothing."""
    silent = Encoded(0, "")
    silent.add([collator.tokenizer.pad_token_id])
    batch = collator.batch([row.encoded for row in rows] or [silent])
    batch = (batch if rows else batch.silenced()).to(device)
    images = {} if past is not None and past.is_valid_BP is not None else batch.images
    inputs = ModelInputs(batch.input_ids_BS, batch.is_valid_BS, batch.is_vision_BS, images, past)
    model.ctx.rolled_out = {}
    with model.autocast(device):
        hidden_BSD = model.hidden(inputs)
    if not rows:
        return {}
    kind_BS = torch.where(batch.is_vision_BS.cpu(), IMAGE, PROMPT)
    for kind_S, row in zip(kind_BS, rows, strict=True):
        length = len(row.encoded.input_ids)
        kind_S[length - row.written : length] = WRITTEN
    count(kind_BS, [row.doc_id for row in rows], [row.index for row in rows])
    return _looked_up(model, hidden_BSD, places)


def _looked_up(model: MoEModel, hidden_BSD: Tensor, places: _Places) -> dict[int, _Sum]:
    """Every place once, however many tokens are scored there."""
    if not places.pair_N:
        return {}
    device, length = hidden_BSD.device, hidden_BSD.shape[1]
    at_N = np.array(places.row_N) * length + np.array(places.column_N)
    at_U, place_N = np.unique(at_N, return_inverse=True)
    order_N = np.argsort(place_N, kind="stable")
    token_N = torch.tensor(places.token_N, device=device)
    hidden_UD = hidden_BSD.flatten(0, 1)[torch.from_numpy(at_U).to(device)]
    log_p, greedy = [], []
    for start in range(0, len(at_U), _AT_ONCE):
        with model.autocast(device):
            logits_UV: Tensor = model.backbone.head(model.hf)(hidden_UD[start : start + _AT_ONCE])
        logits_UV = logits_UV.float()
        low, high = np.searchsorted(place_N[order_N], [start, start + _AT_ONCE])
        here_N = torch.from_numpy(order_N[low:high]).to(device)
        row_N = torch.from_numpy(place_N[order_N[low:high]] - start).to(device)
        chosen_N = logits_UV[row_N, token_N[here_N]]
        log_p.append(chosen_N - logits_UV.logsumexp(-1)[row_N])
        greedy.append(logits_UV.argmax(-1)[row_N] == token_N[here_N])
    pair_N = np.array(places.pair_N)[order_N]
    sums, are_greedy = np.zeros(pair_N.max() + 1), np.ones(pair_N.max() + 1, bool)
    np.add.at(sums, pair_N, torch.cat(log_p).double().cpu().numpy())
    np.logical_and.at(are_greedy, pair_N, torch.cat(greedy).cpu().numpy())
    return {int(p): _Sum(float(sums[p]), bool(are_greedy[p])) for p in np.unique(pair_N)}
