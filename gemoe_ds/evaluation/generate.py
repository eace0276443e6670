"""Writing answers: greedy or sampled, with a KV cache, each token with as many experts as it gets.

Shapes: B sequences, S tokens of the prompts, L MoE layers, V vocabulary.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from gemoe_ds.data.collate import Batch
from gemoe_ds.evaluation.fixed_step import FixedStep, why_no_graph
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.kv_cache import DecodeState
from gemoe_ds.models.moe_model import MoEModel


@dataclass
class GenerationStats:
    """What was done for a number of tokens, all of them through the model once."""

    tokens: int = 0
    seconds: float = 0.0
    attended: int = 0  # tokens that they attended to, themselves included
    experts_L: np.ndarray | int = 0  # visits of real experts, layer by layer

    def count(self, model: MoEModel, past: DecodeState) -> None:
        """Count what the forward has done that `model` has just finished."""
        ctx = model.ctx
        valid_T, known_BP = ctx.is_valid_T, past.is_valid_BP
        assert known_BP is not None
        length = valid_T.numel() // known_BP.shape[0]
        seen_T = known_BP.cumsum(1)[:, -length:].flatten()
        k_L = [(record.k_T * valid_T).sum() for record in ctx.layers]  # type: ignore[operator]
        sums = torch.stack([valid_T.sum(), (seen_T * valid_T).sum(), *k_L])
        tokens, attended, *experts_L = sums.tolist()  # the one wait
        self.tokens += tokens
        self.attended += attended
        self.experts_L = self.experts_L + np.array(experts_L)

    def __add__(self, other: GenerationStats) -> GenerationStats:
        return GenerationStats(
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.attended + other.attended,
            self.experts_L + other.experts_L,
        )

    @property
    def mean_k_L(self) -> list[float]:
        mean: list[float] = (np.atleast_1d(self.experts_L) / max(self.tokens, 1)).tolist()
        return mean

    @property
    def context(self) -> float:
        """Tokens that a token attended to on average."""
        return self.attended / max(self.tokens, 1)


@dataclass
class Written:
    """Answers of a batch, each with the token that ended it, if one did."""

    token_ids: list[list[int]]
    prompts: GenerationStats = field(
        default_factory=GenerationStats
    )  # reading them, images included
    steps: GenerationStats = field(
        default_factory=GenerationStats
    )  # one token of every unfinished sequence at a time


def alone(here: bool) -> bool:
    """`any_rank` of a rank whose experts are all its own."""
    return here


@torch.no_grad()
def generate(
    model: MoEModel,
    prompts: Batch,
    *,
    max_new_tokens: int | Sequence[int],
    end_ids: set[int],
    temperature: float = 0.0,
    seed: int = 0,
    any_rank: Callable[[bool], bool] = alone,
    count: bool = True,
    choose: Callable[[Tensor], Tensor] | None = None,
    has_ended: Callable[[int, list[int]], bool] | None = None,
    after_forward: Callable[[], object] | None = None,
    cuda_graph: bool = False,
) -> Written:
    """Continue prompts that are padded on the left, until each has met one of `end_ids`.

    At temperature 0 the likeliest token is taken, unless `choose` takes others (logits [B, V] ->
    ids [B]). `max_new_tokens` may be one number for all or one for each; `has_ended`, given a row
    and its tokens so far, ends that row. A sequence that has ended visits no expert while others go
    on. Ranks that share experts must take the same number of steps: `any_rank` says whether one of
    them has tokens left to write, and a rank that has finished goes on with an empty batch until
    then. Without `count` only seconds are measured; tokens and experts are not counted.
    `after_forward` finds what was routed in the model's context: `RoutingCounter.while_writing`.
    With `cuda_graph` the steps are those of `FixedStep`, captured anew for every call; where they
    cannot be, a line on stderr says why, and answers are written as without.
    """
    was_training, ctx = model.training, model.ctx
    model.eval()
    before, ctx.trace = ctx.trace, count or after_forward is not None
    try:
        return _generate(
            model,
            prompts,
            _limits(max_new_tokens, len(prompts.ids)),
            end_ids,
            choose or _chooser(prompts, temperature, seed),
            any_rank,
            has_ended or (lambda row, token_ids: False),
            after_forward or (lambda: None),
            count,
            cuda_graph and may_use_graph(model, len(prompts.ids), recorded=ctx.trace),
        )
    finally:
        ctx.trace = before
        model.train(was_training)


def may_use_graph(
    model: MoEModel,
    num_sequences: int,
    *,
    recorded: bool,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> bool:
    """Whether nothing is known to stand against it; else one line says what."""
    why_not = why_no_graph(model, num_sequences, recorded=recorded)
    if why_not:
        say(f"no CUDA graph: {why_not}; answers are written without")
    return not why_not


def _limits(max_new_tokens: int | Sequence[int], num_sequences: int) -> list[int]:
    if isinstance(max_new_tokens, int):
        return [max_new_tokens] * num_sequences
    assert len(max_new_tokens) == num_sequences, "a number for each prompt"
    return list(max_new_tokens)


def _generate(
    model: MoEModel,
    prompts: Batch,
    limits: list[int],
    end_ids: set[int],
    choose: Callable[[Tensor], Tensor],
    any_rank: Callable[[bool], bool],
    has_ended: Callable[[int, list[int]], bool],
    after_forward: Callable[[], object],
    count: bool,
    cuda_graph: bool,
) -> Written:
    past = DecodeState()
    written = Written([[] for _ in prompts.ids])
    inputs, work = replace(prompts.model_inputs, past=past), written.prompts
    step: FixedStep | None = None
    last: tuple[Tensor, Tensor] | None = None  # of every sequence a token; whether it goes on
    # A row of padding stands for a rank that has run out.
    going = inputs.is_valid_BS.any(1).tolist()
    while True:
        began = time.perf_counter()
        if last is not None and cuda_graph and step is None:
            step = FixedStep(model, past, max(limits))
            step.capture()
        next_B = choose(step(*last) if step and last else model.next_logits(inputs))
        chosen = next_B.tolist()  # waits for the device
        work.seconds += time.perf_counter() - began
        if count:
            work.count(model, past)
        after_forward()
        for row, token in enumerate(chosen):
            if going[row]:
                answer = written.token_ids[row]
                answer.append(token)
                full = len(answer) >= limits[row]
                going[row] = not (full or token in end_ids or has_ended(row, answer))
        if not any_rank(any(going)):
            return written
        last = next_B, torch.tensor(going, device=next_B.device)
        inputs, work = one_token(*last, past), written.steps


def one_token(token_B: Tensor, is_valid_B: Tensor, past: DecodeState) -> ModelInputs:
    """The next of every sequence, text."""
    valid_B1 = is_valid_B[:, None]
    return ModelInputs(token_B[:, None], valid_B1, torch.zeros_like(valid_B1), past=past)


def _chooser(prompts: Batch, temperature: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Logits [B, V] -> token ids [B]"""
    if temperature == 0:
        return lambda logits_BV: logits_BV.argmax(-1)
    generator = torch.Generator(prompts.input_ids_BS.device).manual_seed(seed)

    def sampled(logits_BV: Tensor) -> Tensor:
        return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)[
            :, 0
        ]

    return sampled
