"""Answers to the miniature benchmarks without a model: the right ones, or whatever a test wants.

`answer_with` leaves the folders of `gemoe benchmark answer`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemoe_ds.analysis.benchmarks.files import MODE
from gemoe_ds.evaluation.benchmarks.answered import ANSWERS, ASKED
from gemoe_ds.evaluation.benchmarks.load_tasks import load_tasks
from gemoe_ds.evaluation.benchmarks.requests import Answer, Request
from gemoe_ds.evaluation.benchmarks.task_options import TaskOptions
from gemoe_ds.evaluation.benchmarks.tasks import Task


def right_text(task: str, doc: dict[str, Any]) -> str:
    """What gets full marks, of a document of `miniature`."""
    match task:
        case "ai2d":
            return "ABCD"[int(doc["answer"])]
        case "scienceqa_img":
            return "AB"[doc["answer"]]
        case "textvqa_val" | "vqav2_val":
            return "red"
        case "infovqa_val":
            return "wood"
        case "ocrbench":
            return "it says STOP"
        case "gsm8k":
            return str(doc["answer"])
        case "humaneval":
            return str(doc["canonical_solution"])
        case _ if task.startswith("bbh_"):
            return f"So the answer is {doc['target']}."
    return str(doc["answer"])


def right(task: Any, request: Request) -> Answer:
    """Of a loaded task of either harness."""
    doc = task._docs[request.doc_id]
    if request.kind == "generate":
        return Answer(
            request.key, request.doc_id, request.index, text=right_text(request.task, doc)
        )
    gold = int(doc["answer"] if "answer" in doc else doc["label"])
    is_gold = request.index == gold
    likelihood = -0.5 if is_gold else -9.0
    return Answer(
        request.key,
        request.doc_id,
        request.index,
        log_likelihood=likelihood,
        is_greedy=is_gold,
    )


def answer_with(
    out: Path,
    names: Sequence[str],
    options: TaskOptions,
    answer: Callable[[Any, Request], Answer] = right,
    mode: str = "trained",
) -> list[Task]:
    """OUT/MODE with the answers to all these tasks."""
    tasks = load_tasks(names, options)
    for task in tasks:
        folder = out / mode / task.name
        folder.mkdir(parents=True)
        asked = [one for doc in range(task.num_documents) for one in task.requests_of(doc)]
        lines = [answer(task, request).as_json() + "\n" for request in asked]
        (folder / ANSWERS).write_text("".join(sorted(lines)))
        told = {
            "harness": task.harness,
            "group": task.group,
            "num_documents": task.num_documents,
            "num_requests": len(asked),
            "choices": {**task.choices, "prompt_style": "default", "max_length": 2048},
        }
        (folder / ASKED).write_text(json.dumps(told))
    (out / mode / MODE).write_text("{}")
    return tasks
