"""Scores by the stock evaluators over stored answers: one process, no model, no device.

OUT/MODE/TASK/scores.json, scored.npz    `Scores`, and scores document by document
OUT/MODE/TASK/harness.txt, submissions/  what the evaluator prints and writes beside
OUT/MODE/groups.json                     groups such as mmlu, as lm-eval adds them up
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import lm_eval.evaluator
import lmms_eval.evaluator
import numpy as np

from gemoe_ds.analysis.benchmarks.columns import COLUMNS
from gemoe_ds.analysis.benchmarks.files import SCORED, SCORES, Scores
from gemoe_ds.errors import DataError, GemoeError, OutputError, in_a_line
from gemoe_ds.evaluation.benchmarks.answered import AnsweredTask
from gemoe_ds.evaluation.benchmarks.code_metric import code_may_run
from gemoe_ds.evaluation.benchmarks.harnesses import label, quiet_and_seeded
from gemoe_ds.evaluation.benchmarks.lm_eval_tasks import LmEvalNames, configure
from gemoe_ds.evaluation.benchmarks.needs import needs_judge
from gemoe_ds.evaluation.benchmarks.replay import LmEvalReplay, LmmsEvalReplay, Recorder
from gemoe_ds.evaluation.benchmarks.task_options import TaskOptions
from gemoe_ds.files import write_text

GROUPS, LOG = "groups.json", "harness.txt"
PACKAGES = ("lm_eval", "lmms_eval", "datasets", "evaluate", "numpy", "torch", "transformers")


@dataclass(frozen=True)
class Scored:
    """A task as the harness scored it."""

    answered: AnsweredTask
    scores: Scores
    warnings: list[str]


def score_language(
    parts: Sequence[tuple[AnsweredTask, Any]], group: str | None, *, judge: str | None = None
) -> Iterator[Scored]:
    """Tasks of lm-eval, answered and their leaves; all of `group`, if it is not None. `judge`: of
    those that have one."""
    groups: dict[str, Any] = {}
    if group is None:
        tasks = {answered.name: leaf.load_stock() for answered, leaf in parts}
    else:
        loaded = LmEvalNames().load_group(group)
        tasks = {task.task_name: task for task in loaded.get_all_tasks()}
        groups = {one.name: one for one in (loaded, *loaded.get_all_groups())}
    by_name = {answered.name: answered for answered, _ in parts}
    judges = {answered.name: judge for answered, leaf in parts if needs_judge(leaf)}
    for name, task in tasks.items():
        shots = by_name[name].choices["num_fewshot"]
        configure(task, TaskOptions(num_fewshot=shots), shots)
    recorders = {name: Recorder(task) for name, task in tasks.items()}
    folder = parts[0][0].folder
    with _evaluating(folder if group is None else folder.parent / f"{group}.{LOG}"), code_may_run():
        results = lm_eval.evaluator.evaluate(
            lm=LmEvalReplay(tasks, by_name),
            task_dict={"tasks": tasks, "groups": groups},
            limit=parts[0][0].choices["limit"],
            log_samples=False,
            confirm_run_unsafe_code=True,  # asked for before: needs.py
        )
    if groups:
        told = {name: _numbers(results["results"][name]) for name in groups}
        path = folder.parent / GROUPS
        before = json.loads(path.read_bytes()) if path.exists() else {}
        write_text(path, json.dumps(before | told, indent=1) + "\n")
    for name, task in tasks.items():
        filters = [one.name for one in task._filters]
        rows = _by_filter(recorders[name].rows, filters, by_name[name].num_documents)
        yield _written(by_name[name], results, task, rows, recorders[name].drew, judges.get(name))


def score_vision(answered: AnsweredTask, leaf: Any, style: Any, judge: str | None) -> Scored:
    """A task of lmms-eval. Its code is imported anew: OCRBench goes on adding to its last sums."""
    task = leaf.load_stock(TaskOptions(style=style))
    recorder = Recorder(task)
    options = SimpleNamespace(output_path=str(answered.folder), process_with_media=False)
    with _evaluating(answered.folder):
        results = lmms_eval.evaluator.evaluate(
            lm=LmmsEvalReplay(task, answered),
            task_dict={answered.name: task},
            limit=answered.choices["limit"],
            bootstrap_iters=0,
            log_samples=False,
            cli_args=options,
            process_docs_parallel=1,
            distributed_executor_backend="torchrun",  # the other one looks for a device
        )
    every = 1 + task.config.repeats if (task.config.repeats or 1) > 1 else 1
    filters = [one.name for one in task._filters]
    rows = _by_filter(recorder.rows[::every], filters, answered.num_documents)
    unjudged = sum(_was_not_judged(value) for row in rows for value in row.values())
    if unjudged:
        raise DataError(
            f"{answered.name}: the judge {judge} gave no answer for {unjudged} documents, which "
            "the harness counts as 0: nothing is written; look at its key, its URL and its limits"
        )
    return _written(
        answered, results, task, rows, recorder.drew, judge if needs_judge(leaf) else None
    )


def _was_not_judged(value: Any) -> bool:
    return isinstance(value, dict) and value.get("eval_model") == ""


@contextlib.contextmanager
def _evaluating(folder: Path) -> Iterator[None]:
    """What evaluators print goes into a file; seeds are those of lm-eval."""
    path = folder / LOG if folder.is_dir() else folder
    with path.open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        with contextlib.redirect_stderr(log), quiet_and_seeded():
            try:
                yield
            except GemoeError:
                raise
            except Exception as error:  # of any kind: the code of 16,000 tasks
                raise DataError(
                    f"{path.parent.name}: the harness cannot score it ({in_a_line(error, 300)}); "
                    "some tasks need all of their documents (MME's come in pairs), without "
                    "--limit; or leave it out with --tasks"
                ) from error


def _by_filter(
    rows: Sequence[Mapping[str, Any]], filters: Sequence[str], num_documents: int
) -> list[dict[str, Any]]:
    """One a document, by the stock keys. The harness goes through all documents for each filter."""
    if len(rows) != num_documents * len(filters):
        raise DataError(
            f"{len(rows):,} documents were scored, and asked.json has {num_documents:,}: run "
            "`gemoe benchmark answer` again"
        )
    found: list[dict[str, Any]] = [{} for _ in range(num_documents)]
    for place, row in enumerate(rows):
        name, doc = filters[place // num_documents], place % num_documents
        found[doc] |= {f"{metric},{name}": value for metric, value in row.items()}
    return found


def _written(
    answered: AnsweredTask,
    results: Mapping[str, Any],
    task: Any,
    rows: Sequence[Mapping[str, Any]],
    drew: int,
    judge: str | None,
) -> Scored:
    """scores.json and scored.npz of a task."""
    name = answered.name
    metrics = _numbers(results["results"][name])
    choices = {**answered.choices, **({"judge": judge} if judge else {})}
    task_version = results["versions"].get(name)
    scores = Scores(
        task=name,
        harness=label(answered.harness),
        version=task_version if isinstance(task_version, str | int | float) else None,
        num_documents=answered.num_documents,
        metrics=metrics,
        choices=choices,
        software={one: version(one) for one in PACKAGES} | {"python": platform.python_version()},
    )
    arrays: dict[str, np.ndarray] = {
        "doc_id_N": np.arange(answered.num_documents, dtype=np.int64),
        "right_N": _main_scores(name, task, metrics, rows),
    }
    for key in metrics:
        values = [_number(row[key]) for row in rows if key in row]
        if len(values) == len(rows) and None not in values:
            arrays[key] = np.array(values, np.float64)
    try:
        np.savez(answered.folder / SCORED, **arrays)  # type: ignore[arg-type]
        write_text(answered.folder / SCORES, scores.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"{answered.folder} cannot be written to: {error}") from error
    return Scored(answered, scores, _warnings(answered, drew))


def _warnings(answered: AnsweredTask, drew: int) -> list[str]:
    """What a reader of the numbers must know."""
    found = []
    texts = [str(answer.text).strip() for answer in answered.answers.values()]
    other = sum(text.lower() not in ("yes", "no") for text in texts)
    if answered.name.startswith("pope") and other:
        found.append(
            f"{answered.name}: {other:,} of {len(texts):,} answers are not yes or no and nothing "
            "else: the harness counts them as wrong, and leaves them out of precision, recall and "
            "F1, which then are of the others alone"
        )
    if answered.name.startswith("ocrbench") and answered.num_documents != 1000:
        found.append(
            f"{answered.name}: the harness divides by 1,000 questions, and "
            f"{answered.num_documents:,} were asked"
        )
    if drew:
        found.append(
            f"{answered.name}: {drew:,} of {answered.num_documents:,} answers could not be read, "
            "and the harness chose options at random for them (from fixed seeds)"
        )
    return found


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """By the stock keys; an evaluator also gives names, lists and N/A."""
    found = {key: _number(value) for key, value in metrics.items() if "," in key}
    return {key: value for key, value in found.items() if value is not None}


def _number(value: Any) -> float | None:
    """Of what a task says of one document: a number, or a dict with its score."""
    if isinstance(value, dict):
        value = value.get("score")
    if isinstance(value, bool | int | float | np.number) and math.isfinite(value):
        return float(value)
    return None


def _main_scores(
    name: str, task: Any, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """Of every document, by the column's metric; by the first of the task that is of none.

    Where a task only says something of all documents, it is asked about those that belong together:
    one, or the turns of a question of MMBench.
    """
    column = next((one for one in COLUMNS if one.has(name)), None)
    keys = [*(column.metrics if column else ()), *metrics]
    whole = [next((row[key] for key in keys if key in row), None) for row in rows]
    numbers = [_number(value) for value in whole]
    if None not in numbers:
        return np.array(numbers, np.float64)
    key = next(key for key in keys if any(key in row for row in rows))
    function = task.aggregation()[key.rpartition(",")[0]]
    takes_folder = "args" in inspect.signature(function).parameters  # to write submissions to
    together: dict[Any, list[int]] = {}
    for place, value in enumerate(whole):
        together.setdefault(_belongs_to(value, place), []).append(place)
    scale = column.scale / 100 if column else 1.0
    right_N = np.full(len(rows), np.nan)
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(None), quiet_and_seeded():
        options = {"args": SimpleNamespace(output_path=folder)} if takes_folder else {}
        for places in together.values():
            right_N[places] = function([whole[place] for place in places], **options) * scale
    return right_N


def _belongs_to(value: Any, place: int) -> Any:
    index = value.get("index") if isinstance(value, dict) else None
    return place if index is None else int(index) % 1_000_000
