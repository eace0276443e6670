"""A task of a benchmark as the dispatcher sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from gemoe_ds.evaluation.benchmarks.requests import Request


class Task(Protocol):
    """Its documents, which are many, and what is asked about one of them.

    The same in every process: ranks index it alike. Requests are made when they are asked for, so
    that memory does not grow with the benchmark.
    """

    name: str  # a leaf task
    harness: str  # lm_eval, lmms_eval
    group: str | None  # the group that it was asked for with, such as mmlu
    num_documents: int
    choices: Mapping[str, Any]  # what the paper does not say: num_fewshot, limit, ...

    def requests_of(self, doc: int) -> list[Request]:
        """Of the document at this place, from 0 on; `doc_id` is the harness's own."""
        ...
