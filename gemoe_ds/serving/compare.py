"""How far two servers agree on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gemoe_ds.serving.exchange import Answer


@dataclass(frozen=True)
class Agreement:
    """Of a server's greedy answers with those of another one."""

    answers: int
    other_prompts: int  # the two saw different tokens: nothing else is compared of these
    equal: int
    ties: int  # first differ where the two best tokens are within twice the tolerance
    largest: float  # difference of log-probabilities of the same token after the same tokens

    def holds(self, tolerance: float) -> bool:
        # `largest` may be NaN, which is no agreement
        return self.equal + self.ties == self.answers and self.largest <= tolerance


def compare(ours: Sequence[Answer], theirs: Sequence[Answer], tolerance: float) -> Agreement:
    """After the first token that differs nothing is the same, so nothing is compared."""
    other = equal = ties = 0
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.prompt_ids != b.prompt_ids:
            other += 1
            continue
        first = _first_difference(a.ids, b.ids)
        pairs = list(zip(a.logprobs[:first], b.logprobs[:first], strict=True))
        if first is None:
            equal += 1
        else:
            ties += _is_tie(a, b, first, tolerance)
            pairs += _at(a, b, first)
        for one, two in pairs:
            largest = _larger(largest, abs(one - two))
    return Agreement(len(ours), other, equal, ties, largest)


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    for place, (one, two) in enumerate(zip(a, b, strict=False)):
        if one != two:
            return place
    return None if len(a) == len(b) else min(len(a), len(b)) - 1


def _is_tie(a: Answer, b: Answer, place: int, tolerance: float) -> bool:
    """Either token is the other server's second choice, and as good but for rounding."""
    return (
        a.second_ids[place] == b.ids[place]
        and b.second_ids[place] == a.ids[place]
        and a.logprobs[place] - a.second_logprobs[place] <= 2 * tolerance
        and b.logprobs[place] - b.second_logprobs[place] <= 2 * tolerance
    )


def _at(a: Answer, b: Answer, place: int) -> list[tuple[float, float]]:
    """Log-probabilities of the same tokens where the answers part, as far as both are known."""
    of_a = {a.ids[place]: a.logprobs[place], a.second_ids[place]: a.second_logprobs[place]}
    of_b = {b.ids[place]: b.logprobs[place], b.second_ids[place]: b.second_logprobs[place]}
    return [(of_a[token], of_b[token]) for token in of_a.keys() & of_b.keys()]


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
