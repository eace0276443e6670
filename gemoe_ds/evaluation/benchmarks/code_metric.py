"""code_eval, as the hub's metric of this name answers it: for tasks of lm-eval that run code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import datasets
import evaluate

from gemoe_ds.evaluation.benchmarks.code import all_pass, pass_at_k

_MAY_RUN = ContextVar("may_run", default=False)


@contextmanager
def code_may_run() -> Iterator[None]:
    """Only while answers are scored, and only if the user has said so."""
    token = _MAY_RUN.set(True)
    try:
        yield
    finally:
        _MAY_RUN.reset(token)


class CodeEval(evaluate.Metric):
    def _info(self) -> Any:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=str(__doc__),
            citation="",
            inputs_description="",
            features=datasets.Features(
                {"predictions": datasets.Sequence(text), "references": text}
            ),
        )

    def _compute(
        self, predictions: Sequence[Sequence[str]], references: Sequence[str], k: Sequence[int]
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """pass@k over tasks; those with fewer than k programs count in no pass@k."""
        if not _MAY_RUN.get():  # a task tries its metric when it is imported, to answer too
            return {f"pass@{one}": float("nan") for one in k}, {}
        programs = [
            f"{candidate}\n{test}"
            for candidates, test in zip(predictions, references, strict=True)
            for candidate in candidates
        ]
        owners = [task for task, candidates in enumerate(predictions) for _ in candidates]
        results: dict[int, list[bool]] = {task: [] for task in range(len(predictions))}
        for task, passed in zip(owners, all_pass(programs), strict=True):
            results[task].append(passed)
        samples = {task: (len(of), Counter(of)[True]) for task, of in results.items()}
        scores = {}
        for one in k:
            chances = [
                pass_at_k(total, right, one) for total, right in samples.values() if total >= one
            ]
            if len(chances) == len(samples):
                scores[f"pass@{one}"] = sum(chances) / len(chances)
        return scores, results
