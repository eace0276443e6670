"""Models of both harnesses that have answered before, and what a task says of each document.

No model is read and no device is used.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import LM
from lmms_eval.api.model import lmms

from gemoe_ds.evaluation.benchmarks import lm_eval_tasks, lmms_eval_tasks
from gemoe_ds.evaluation.benchmarks.answered import AnsweredTask
from gemoe_ds.evaluation.benchmarks.requests import Answer, Request

# MMBench writes answers to a spreadsheet, which takes none of these.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


class LmEvalReplay(LM):
    """`tasks`: the loaded ones, whose requests were built; `answered`: of each, by its name."""

    def __init__(self, tasks: Mapping[str, Any], answered: Mapping[str, AnsweredTask]) -> None:
        super().__init__()
        self._tasks, self._answered = tasks, answered
        self._waiting: dict[int, Iterator[Request]] = {}

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        found = self._answers(requests)
        return [(float(one.log_likelihood or 0.0), bool(one.is_greedy)) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        return [float(one.log_likelihood or 0.0) for one in self._answers(requests)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        return [str(one.text) for one in self._answers(requests)]

    def _answers(self, instances: Sequence[Any]) -> list[Answer]:
        """An instance comes once for each repeat."""
        if not self._waiting:
            for name, task in self._tasks.items():
                self._waiting |= _by_instance(name, task.instances)
        asked = [(one.task_name, next(self._waiting[id(one)])) for one in instances]
        return [self._answered[name].answer(request) for name, request in asked]


def _by_instance(name: str, instances: Sequence[Any]) -> dict[int, Iterator[Request]]:
    """What each instance asks, one request for each repeat."""
    documents: dict[int, list[Any]] = {}
    for instance in instances:
        documents.setdefault(instance.doc_id, []).append(instance)
    found = {}
    for doc_id, of_document in documents.items():
        requests = iter(lm_eval_tasks.as_requests(name, doc_id, of_document))
        for one in of_document:
            found[id(one)] = iter([next(requests) for _ in range(one.repeats or 1)])
    return found


class LmmsEvalReplay(lmms):
    is_simple = True

    def __init__(self, task: Any, answered: AnsweredTask) -> None:
        super().__init__()
        self._task, self._answered, self.device = task, answered, torch.device("cpu")
        self._waiting: dict[int, Iterator[Request]] = {}

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        texts = []
        for one in requests:
            if id(one) not in self._waiting:
                asked = lmms_eval_tasks.as_requests(self._task, one.doc_id, one)
                self._waiting[id(one)] = iter(asked)
            answer = self._answered.answer(next(self._waiting[id(one)]))
            texts.append(_CONTROL.sub("", str(answer.text)))
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        raise NotImplementedError

    def clean(self) -> None:
        """There is no memory of a device to free."""


class Recorder:
    """Stands before a task's `process_results`, and keeps what it says of each document.

    Some tasks pick at random where an answer cannot be read: every document has its own seed, and
    those that drew are counted.
    """

    def __init__(self, task: Any) -> None:
        self._process, self._name = task.process_results, str(task.config.task)
        self.rows: list[dict[str, Any]] = []
        self.drew = 0
        task.process_results = self

    def __call__(self, doc: Any, results: Any, *more: Any, **options: Any) -> Any:
        random.seed(f"{self._name} {len(self.rows)}")
        before = random.getstate()
        metrics = self._process(doc, results, *more, **options)
        self.drew += random.getstate() != before
        self.rows.append(dict(metrics))
        return metrics
