"""Some answers token by token, for the report: what was asked, what was written, at what k.

Shapes: B sequences, S tokens of each in a forward, N of them that count, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemoe_ds.analysis.benchmarks.files import MAX_SHOWN, SHOWN, ShownAnswer, shown_line
from gemoe_ds.evaluation.benchmarks.requests import Answer
from gemoe_ds.evaluation.benchmarks.tasks import Task
from gemoe_ds.evaluation.routing import Routed
from gemoe_ds.files import write_text

MAX_SHOWN_TOKENS = 400  # of an answer


class WritingK:
    """With how many experts each token was written: the mean over layers, at the last position of
    the forward that it comes from."""

    def __init__(self, num_sequences: int) -> None:
        self.k_B: list[list[float]] = [[] for _ in range(num_sequences)]

    def add(self, found: Routed, length: int) -> None:
        """Of a forward with S = `length`, padded on the left; who has ended is not in it."""
        is_last_N = found.place_N % length == length - 1
        mean_N = found.k_LN[:, is_last_N].mean(0)
        for place, k in zip(found.place_N[is_last_N].tolist(), mean_N.tolist(), strict=True):
            self.k_B[place // length].append(round(k, 4))


def shown_tokens(tokenizer: Any, ids: Sequence[int], k: Sequence[float]) -> list[list[Any]]:
    """[text, k] of every token. A character of several tokens stands with the last of them."""
    pieces: list[list[Any]] = []
    before = ""
    for number in range(1, min(len(ids), MAX_SHOWN_TOKENS) + 1):
        text: str = tokenizer.decode(ids[:number], skip_special_tokens=True)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        pieces.append([whole[len(before) :], k[number - 1]])
        before = max(before, whole, key=len)
    return pieces


def write_shown(folder: Path, task: Task, answers: Path) -> None:
    """shown.jsonl, of the first documents, if any were written. `answers`: answers.jsonl."""
    some = range(min(MAX_SHOWN, task.num_documents))
    first = [task.requests_of(doc)[0] for doc in some]
    questions = {request.key: request.context for request in first}
    lines = []
    with answers.open(encoding="utf-8") as file:
        for line in file:
            if '"tokens": [' not in line:
                continue
            answer = Answer.from_json(line)
            if answer.tokens is not None and answer.key in questions:
                question = questions[answer.key]
                tokens = tuple((text, k) for text, k in answer.tokens)
                lines.append(
                    shown_line(ShownAnswer(doc_id=answer.doc_id, question=question, tokens=tokens))
                )
    if lines:
        write_text(folder / SHOWN, "\n".join(lines) + "\n")
