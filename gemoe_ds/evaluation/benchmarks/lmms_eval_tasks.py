"""Tasks of lmms-eval: which leaves a name has, and what each asks, document by document.

What is asked equals what `build_all_requests` makes of the stock task, without the documents'
pictures, which are opened when a request's `images` are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import lmms_eval.tasks
from lmms_eval import utils
from lmms_eval.api.task import Task as StockTask
from lmms_eval.api.task import _resolve_hf_datasets_cache_dir
from lmms_eval.tasks import TaskManager
from PIL import Image

from gemoe_ds.errors import ConfigError, DataError
from gemoe_ds.evaluation.benchmarks.harnesses import LMMS_EVAL, folders_with, quiet_and_seeded
from gemoe_ds.evaluation.benchmarks.local_data import prepared_apart
from gemoe_ds.evaluation.benchmarks.requests import Request
from gemoe_ds.evaluation.benchmarks.task_options import TaskOptions
from gemoe_ds.evaluation.benchmarks.writing import writing_of

ROOT = Path(lmms_eval.tasks.__file__).parent
_MAX_TOKENS = 1024  # of an answer, where a task does not say


@dataclass(frozen=True)
class LmmsEvalLeaf:
    """A task that is not loaded: no data is read yet, no code of the task is imported."""

    task_name: str
    folder: Path | None  # of the harness, whose tasks are read; None: all
    asked: str  # the task, or the group or tag that holds it
    config: dict[str, Any]  # functions are names
    harness = LMMS_EVAL

    @property
    def refused(self) -> str | None:
        """Why it cannot be answered."""
        kind = self.config.get("output_type", "generate_until")
        if kind in ("loglikelihood", "multiple_choice"):
            return "scores continuations, which only lm_eval's tasks are asked for here"
        if kind != "generate_until":
            return f"asks in several rounds or for pictures ({kind})"
        of_data = self.config.get("dataset_kwargs") or {}
        if of_data.get("video") or of_data.get("From_YouTube"):
            return "is about video"
        return None

    @property
    def data(self) -> tuple[str, str | None]:
        """Repository and configuration; the first is empty where the task's code has the data."""
        return str(self.config.get("dataset_path") or ""), self.config.get("dataset_name")

    def load(self, group: str | None, options: TaskOptions, default_shots: int) -> LmmsEvalTask:
        return LmmsEvalTask(self.load_stock(options), group, options)

    def load_stock(self, options: TaskOptions) -> Any:
        """The harness's own object, with what the style of prompts changes in it."""
        with quiet_and_seeded(), prepared_apart(self.data[0]):
            _resolve_hf_datasets_cache_dir.cache_clear()  # it would keep the first task's
            manager = _manager(self.folder, options.style.model_name)
            stock = dict(_flat(manager.load_task_or_group(self.asked)))[self.task_name]
        options.style.configure(stock)
        return stock


def _manager(folder: Path | None, model_name: str | None = None) -> Any:
    where = {"include_path": str(folder), "include_defaults": False} if folder else {}
    return TaskManager("ERROR", model_name=model_name, **where)


def _flat(loaded: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, task in loaded.items():
        if isinstance(task, dict):
            yield from _flat(task)
        else:
            yield str(name), task


@cache
def _index(folder: Path | None) -> Any:
    with quiet_and_seeded():
        return _manager(folder).task_index


class LmmsEvalNames:
    """Finds names; reads one folder of the harness where that is enough, else all (seconds)."""

    @property
    def everything(self) -> Any:
        return _index(None)

    def leaves(self, name: str) -> tuple[list[LmmsEvalLeaf], bool]:
        """Of a task, group or tag, and whether it is a group; none for a name that is not known."""
        for folder in folders_with(ROOT, name) - {ROOT}:
            index = _index(folder)
            if index.get(name, {}).get("type") == "task":
                return list(_leaves(index, name, folder, name)), False
        if name not in self.everything:
            return [], False
        is_group = self.everything[name]["type"] == "group"
        return list(_leaves(self.everything, name, None, name)), is_group


def _leaves(index: Any, name: str, folder: Path | None, asked: str) -> Iterator[LmmsEvalLeaf]:
    entry = index[name]
    if entry["type"] in ("task", "python_task"):
        config = utils.load_yaml_config(entry["yaml_path"], mode="simple")
        yield LmmsEvalLeaf(name, folder, asked, config)
        return
    members = entry["task"]
    if members == -1:
        members = utils.load_yaml_config(entry["yaml_path"], mode="simple")["task"]
    for member in members:
        if not isinstance(member, str) or member not in index:
            raise ConfigError(
                f"--tasks {asked}: has a task of its own, {member}, which cannot be asked here"
            )
        yield from _leaves(index, member, folder, asked)


class LmmsEvalTask:
    """A `Task` over one of the harness."""

    harness = LMMS_EVAL

    def __init__(self, stock: Any, group: str | None, options: TaskOptions) -> None:
        self.name, self.group = str(stock.config.task), group
        self._stock = stock
        self._docs = stock.eval_docs_no_media
        self.num_documents = min(len(self._docs), options.limit or len(self._docs))
        config = stock.config
        self._split = config.test_split if stock.has_test_docs() else config.validation_split
        shots = config.num_fewshot or 0
        if shots or type(stock).build_all_requests is not StockTask.build_all_requests:
            why = "has examples" if shots else "makes its requests itself"
            raise ConfigError(f"--tasks {self.name}: {why}, which cannot be asked here")
        self.choices: dict[str, Any] = {"num_fewshot": shots, "limit": options.limit}

    def requests_of(self, doc: int) -> list[Request]:
        stock = self._stock
        context = stock.fewshot_context(self._docs[doc], 0)
        metadata = {"task": self.name, "doc_id": doc, "split": self._split}
        instance = stock.construct_requests(
            doc_id=doc, ctx=context, metadata=metadata | {"repeats": stock.config.repeats}
        )
        pictures = partial(self._pictures, doc)
        return as_requests(stock, doc, instance, pictures)

    def _pictures(self, doc: int) -> list[Image.Image]:
        found = self._stock.doc_to_visual(self._stock.dataset[self._split][doc]) or []
        for picture in found:
            if not isinstance(picture, Image.Image):
                raise DataError(
                    f"{self.name}: document {doc} shows a {type(picture).__name__}, and `gemoe "
                    "benchmark` shows pictures only; leave the task out"
                )
        return list(found)


def as_requests(
    stock: Any, doc_id: int, instance: Any, images: Callable[[], list[Image.Image]] = list
) -> list[Request]:
    """One for each repeat."""
    name, options = str(stock.config.task), instance.args[1]
    if options.get("until") == [stock.config.fewshot_delimiter]:
        # The harness's default, between examples; its models take it for no end of an answer.
        options = options | {"until": []}
    writing = writing_of(name, options, _MAX_TOKENS)
    return [
        Request(name, doc_id, index, "generate", instance.args[0], writing=writing, images=images)
        for index in range(stock.config.repeats or 1)
    ]
