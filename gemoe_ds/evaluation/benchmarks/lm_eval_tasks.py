"""Tasks of lm-eval: which leaves a name has, and what each asks, document by document.

What is asked equals what `build_all_requests` makes of the stock task. That holds all requests and
all few-shot documents in memory; here a request is made when it is asked for.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.samplers import get_sampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.api.task import Task as StockTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Kind

from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.benchmarks.harnesses import LM_EVAL, folders_with, quiet_and_seeded
from gemoe_ds.evaluation.benchmarks.local_data import prepared_apart
from gemoe_ds.evaluation.benchmarks.requests import Request
from gemoe_ds.evaluation.benchmarks.task_options import FEWSHOT_SEED, TaskOptions
from gemoe_ds.evaluation.benchmarks.writing import writing_of

ROOT = Path(lm_eval.tasks.__file__).parent
_MAX_TOKENS = 256  # of an answer, where a task does not say
_MOST_WORDED = 2000  # examples and answers of a task that are kept


@dataclass(frozen=True)
class LmEvalLeaf:
    """A task that is not loaded: no data is read yet, no code of the task is imported."""

    task_name: str
    entry: Any
    overrides: dict[str, Any]  # by the groups that it was asked for with
    config: dict[str, Any]  # functions are names
    harness = LM_EVAL

    @property
    def refused(self) -> str | None:
        """Why it cannot be answered."""
        if self.config.get("doc_to_audio"):
            return "is about sound"
        if self.config.get("doc_to_image"):
            return "is about pictures, which lmms_eval's tasks are asked for (lmms_eval:NAME)"
        return None

    @property
    def data(self) -> tuple[str, str | None]:
        """Repository and configuration; the first is empty where the task's code has the data."""
        return str(self.config.get("dataset_path") or ""), self.config.get("dataset_name")

    def load(self, group: str | None, options: TaskOptions, default_shots: int) -> LmEvalTask:
        return LmEvalTask(self.load_stock(lean=True), group, options, default_shots)

    def load_stock(self, lean: bool = False) -> Any:
        """The harness's own object; `lean`: without few-shot documents."""
        overrides = dict(self.overrides)
        if lean and "class" not in self.config:
            overrides["class"] = _LeanTask
        return _SeededFactory()._build_task(self.entry, overrides)


class _Shot(dict[str, Any]):
    """A document that is shown as an example, and its place among those."""

    place = 0


class _LeanTask(ConfigurableTask):
    """Does not list its few-shot documents when it is made, which would be all of a split, and
    words an example once: a template is compiled each time that the harness uses it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._is_made, self._worded = False, dict[tuple[str, int], Any]()
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self._is_made = True

    def fewshot_docs(self) -> Any:
        return super().fewshot_docs() if self._is_made else None

    def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> Any:
        return self._once("text", doc, super().doc_to_text, doc_to_text)

    def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> Any:
        return self._once("target", doc, super().doc_to_target, doc_to_target)

    def _once(self, kind: str, doc: Any, word: Callable[..., Any], template: Any) -> Any:
        if not isinstance(doc, _Shot):
            return word(doc, template)
        key = (kind, doc.place)
        if key not in self._worded:
            if len(self._worded) >= _MOST_WORDED:
                self._worded.clear()
            self._worded[key] = word(doc, template)
        return self._worded[key]


class _SeededFactory(TaskFactory):
    """Loads every task from the same seeds, as a leaf that is asked for by itself is."""

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        config = (entry.cfg or {}) | (overrides or {})
        with quiet_and_seeded(), prepared_apart(str(config.get("dataset_path") or "")):
            return super()._build_task(entry, overrides)


class _Elsewhere(Exception):
    """A group has a member in a folder that was not read."""


class _LeafFactory(TaskFactory):
    """Resolves groups and tags as the harness does, down to leaves, which are not loaded."""

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> LmEvalLeaf:
        config = self._load_full_config(entry, overrides)
        return LmEvalLeaf(str(config["task"]), entry, dict(overrides or {}), config)

    def _load_full_config(
        self, entry: Any, overrides: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return deepcopy(entry.cfg or {}) | (overrides or {})

    def _build_group_members(
        self, members: Any, group: str, overrides: dict[str, Any] | None, registry: Any
    ) -> Any:
        for member in members:
            name = member if isinstance(member, str) else member.get("task")
            if isinstance(name, str) and name not in registry:
                raise _Elsewhere(f"{group} has a task of its own, {name}")
        return super()._build_group_members(members, group, overrides, registry)


@cache
def _index(folder: Path) -> Any:
    return TaskManager(include_path=str(folder), include_defaults=False).task_index


class LmEvalNames:
    """Finds names; reads one folder of the harness where that is enough, else all (seconds)."""

    @property
    def everything(self) -> Any:
        return _index(ROOT)

    def leaves(self, name: str) -> tuple[list[LmEvalLeaf], bool]:
        """Of a task, group or tag, and whether it is a group; none for a name that is not known."""
        entry, index = self._entry(name)
        if entry is None:
            return [], False
        try:
            return _leaves(entry, index), entry.kind is Kind.GROUP
        except _Elsewhere as error:
            raise ConfigError(f"--tasks {name}: {error}, which cannot be asked here") from None

    def load_group(self, name: str) -> Any:
        """The harness's own object, with its tasks, loaded."""
        entry, index = self._entry(name)
        return _SeededFactory().build(entry, overrides=None, registry=dict(index))

    def _entry(self, name: str) -> tuple[Any, Any]:
        for folder in folders_with(ROOT, name) - {ROOT}:
            entry = _index(folder).get(name)
            if entry is not None and entry.kind is not Kind.TAG:
                with suppress(_Elsewhere):
                    _leaves(entry, _index(folder))
                    return entry, _index(folder)
        return self.everything.get(name), self.everything


def _leaves(entry: Any, index: Mapping[str, Any]) -> list[LmEvalLeaf]:
    built = _LeafFactory().build(entry, overrides=None, registry=dict(index))
    return list(_flat(built))


def _flat(built: Any) -> Iterator[LmEvalLeaf]:
    if isinstance(built, LmEvalLeaf):
        yield built
    else:
        for child in built:
            yield from _flat(child)


class LmEvalTask:
    """A `Task` over one of the harness."""

    harness = LM_EVAL

    def __init__(
        self, stock: Any, group: str | None, options: TaskOptions, default_shots: int
    ) -> None:
        self.name, self.group = str(stock.task_name), group
        self._stock, self._options = stock, options
        configure(stock, options, default_shots)
        self._docs = getattr(stock, "task_docs", None) or stock.eval_docs
        self.num_documents = min(len(self._docs), options.limit or len(self._docs))
        shots = stock.config.num_fewshot
        self._drawn: _Drawn | None = None
        if type(stock).build_all_requests is not StockTask.build_all_requests or (
            shots and not isinstance(stock, ConfigurableTask)
        ):
            raise ConfigError(f"--tasks {self.name}: makes its requests itself; leave it out")
        if shots:
            self._drawn = _Drawn(stock, self._docs, self.num_documents)
        self.choices: dict[str, Any] = {
            "num_fewshot": shots,
            "limit": options.limit,
            "chat_template": options.template,
        }

    def requests_of(self, doc: int) -> list[Request]:
        if self._drawn is not None:
            self._drawn.doc = doc
        stock, options, document = self._stock, self._options, self._docs[doc]
        applies = options.chat_template is not None
        context = stock.fewshot_context(
            document,
            num_fewshot=stock.config.num_fewshot,
            system_instruction=None,
            apply_chat_template=applies,
            fewshot_as_multiturn=True,  # examples are turns of their own, if there is a template
            chat_template=options.chat_template,
            gen_prefix=stock.doc_to_prefix(document),
        )
        made = stock.construct_requests(
            doc=document,
            ctx=context,
            metadata=(stock.config["task"], doc, stock.config.repeats),
            apply_chat_template=applies,
            chat_template=options.chat_template,
        )
        asked = made if isinstance(made, list) else [made]
        return as_requests(self.name, doc, asked)


def configure(stock: Any, options: TaskOptions, default_shots: int) -> None:
    """Shots and seed, as `simple_evaluate` does: a task that says 0 keeps 0."""
    own = stock.get_config("num_fewshot")
    if own is None or (own != 0 and options.num_fewshot is not None):
        shots = default_shots if options.num_fewshot is None else options.num_fewshot
        stock.set_config(key="num_fewshot", value=shots)
    stock.set_fewshot_seed(seed=FEWSHOT_SEED)


def as_requests(name: str, doc_id: int, instances: Sequence[Any]) -> list[Request]:
    """In the order of the instances; one for each repeat."""
    requests: list[Request] = []
    for instance in instances:
        for _ in range(instance.repeats or 1):
            requests.append(_request(name, doc_id, len(requests), instance))
    return requests


def _request(name: str, doc_id: int, index: int, instance: Any) -> Request:
    arguments = instance.args
    if instance.request_type == "loglikelihood":
        context, continuation = arguments
        return Request(name, doc_id, index, "loglikelihood", context, continuation)
    if instance.request_type == "loglikelihood_rolling":
        return Request(name, doc_id, index, "rolling", arguments[0])
    writing = writing_of(name, arguments[1] or {}, _MAX_TOKENS)
    return Request(name, doc_id, index, "generate", arguments[0], writing=writing)


class _Drawn:
    """Few-shot examples by document, in any order.

    Stock samplers draw at random in the order of the documents. So one of them draws places once,
    for all documents; 4 bytes for each example are kept.
    """

    def __init__(self, stock: Any, docs: Sequence[Any], num_documents: int) -> None:
        config, shots = stock.config, stock.config.num_fewshot
        self._pool = stock.fewshot_docs()
        chosen = stock.fewshot_cfg.sampler if config.fewshot_config else "default"
        sampler_class = get_sampler(chosen) if isinstance(chosen, str) else chosen
        rows = [_Row(self._pool, place) for place in range(len(self._pool))]
        sampler = sampler_class(rows, rnd=None).set_rnd(FEWSHOT_SEED)
        among_asked = stock.fewshot_cfg.split == config.test_split
        self._shots, self._places, self.doc = shots, array("i"), 0
        for doc in range(num_documents):
            try:
                drawn = sampler.sample(n=shots, eval_doc=docs[doc] if among_asked else None)
            except (AssertionError, ValueError):
                raise ConfigError(
                    f"--num-fewshot {shots}: {config.task} has {len(rows)} documents that examples "
                    "are drawn from; ask for fewer"
                ) from None
            self._places.extend(row.place for row in drawn)
        stock.sampler = self

    def sample(self, n: int, eval_doc: Any = None) -> list[Any]:
        first = self.doc * self._shots
        return [self._shot(place) for place in self._places[first : first + n]]

    def _shot(self, place: int) -> _Shot:
        shot = _Shot(self._pool[place])
        shot.place = place
        return shot


class _Row(Mapping[str, Any]):
    """A document that is read only where a sampler compares it."""

    __slots__ = ("_pool", "place")

    def __init__(self, pool: Sequence[Any], place: int) -> None:
        self._pool, self.place = pool, place

    def __getitem__(self, key: str) -> Any:
        return self._pool[self.place][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pool[self.place])

    def __len__(self) -> int:
        return len(self._pool[self.place])

    def __eq__(self, other: object) -> bool:
        return bool(self._pool[self.place] == other)

    __hash__ = None  # type: ignore[assignment]
