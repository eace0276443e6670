"""Names -> tasks: the paper's sets, and every task, group and tag of both harnesses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gemoe_ds.analysis.benchmarks import columns
from gemoe_ds.errors import ConfigError, DataError, GemoeError, in_a_line
from gemoe_ds.evaluation.benchmarks.harnesses import LM_EVAL, LMMS_EVAL, check_installed, label
from gemoe_ds.evaluation.benchmarks.local_data import data_of
from gemoe_ds.evaluation.benchmarks.prompt_styles.default import DefaultStyle
from gemoe_ds.evaluation.benchmarks.task_options import TaskOptions
from gemoe_ds.evaluation.benchmarks.tasks import Task

# Of these, a name alone means lmms_eval's: lm_eval has another mmmu_val.
_VISION = tuple(column.task for column in columns.VISION + columns.MORE)
SETS = {
    "paper-vision": tuple(column.task for column in columns.VISION),
    "paper-more": tuple(column.task for column in columns.MORE),
    "paper-language": tuple(column.task for column in columns.LANGUAGE),
}
_SHOTS = {"mmlu": 5}  # of paper-language; lm_eval asks without examples unless told


@dataclass(frozen=True)
class Asked:
    """A leaf task of a harness, and the name that it was asked for with."""

    leaf: Any  # LmEvalLeaf or LmmsEvalLeaf
    name: str
    is_group: bool
    default_shots: int = 0


def resolve(names: Sequence[str]) -> list[Asked]:
    """Each leaf once; no data is read. ConfigError for what is unknown or cannot be answered."""
    check_installed()
    from gemoe_ds.evaluation.benchmarks.lm_eval_tasks import LmEvalNames
    from gemoe_ds.evaluation.benchmarks.lmms_eval_tasks import LmmsEvalNames

    if not names:
        raise ConfigError(f"--tasks: name some, such as {', '.join(SETS)}")
    known: dict[str, Any] = {LM_EVAL: LmEvalNames(), LMMS_EVAL: LmmsEvalNames()}
    found: dict[str, Asked] = {}
    for name, shots in members(names):
        for asked in _leaves(known, name, shots):
            task = asked.leaf.task_name
            other = found.setdefault(task, asked)
            if other.leaf.harness != asked.leaf.harness or other.default_shots != shots:
                raise ConfigError(
                    f"--tasks {other.name} {name}: both have {task}, and ask it in two ways; "
                    "leave one of them out, or give each its own --out"
                )
    _refuse(found.values())
    return list(found.values())


def all_names() -> list[tuple[str, str]]:
    """Harness and name of every task, group and tag, sorted."""
    check_installed()
    from gemoe_ds.evaluation.benchmarks.lm_eval_tasks import LmEvalNames
    from gemoe_ds.evaluation.benchmarks.lmms_eval_tasks import LmmsEvalNames

    known: dict[str, Any] = {LM_EVAL: LmEvalNames(), LMMS_EVAL: LmmsEvalNames()}
    return sorted((harness, name) for harness in known for name in known[harness].everything)


def load_tasks(names: Sequence[str], options: TaskOptions) -> list[Task]:
    """Every leaf task, ready to be asked. Before a model is read, and before a process group or
    CUDA is there: some tasks fork while they load."""
    asked = resolve(names)
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit {options.limit} must be 1 document at least")
    if options.num_fewshot is not None:
        if options.num_fewshot < 0:
            raise ConfigError(f"--num-fewshot {options.num_fewshot} must be 0 at least")
        if all(one.leaf.harness == LMMS_EVAL for one in asked):
            raise ConfigError("--num-fewshot: none of --tasks is a language task; leave it out")
    if options.style.name != DefaultStyle.name and not any(
        one.leaf.harness == LMMS_EVAL for one in asked
    ):
        raise ConfigError(
            f"--prompt-style {options.style.name}: none of --tasks is a vision task; leave it out"
        )
    with data_of([one.leaf for one in asked], options.data):
        return _load_all(asked, options)


def without_examples(tasks: Iterable[Task], options: TaskOptions) -> str:
    """A note on the tasks whose own files fix 0 examples, whatever --num-fewshot says; "" if
    there is none. ConfigError if --num-fewshot changes nothing at all."""
    if not options.num_fewshot:
        return ""
    language = [task for task in tasks if task.harness == LM_EVAL]
    kept = [task.name for task in language if task.choices["num_fewshot"] == 0]
    if not kept:
        return ""
    some = f"{', '.join(kept[:3])}{f' and {len(kept) - 3} more' if len(kept) > 3 else ''}"
    told = f"--num-fewshot {options.num_fewshot} changes nothing in {some}, whose files fix 0"
    if len(kept) == len(language):
        raise ConfigError(f"{told}; leave it out")
    return told


def _load_all(asked: Sequence[Asked], options: TaskOptions) -> list[Task]:
    """All of them are tried, so that all that cannot be loaded is told at once."""
    tasks: list[Task] = []
    failed: list[DataError] = []
    for one in asked:
        try:
            tasks.append(_load(one, options))
        except DataError as error:
            failed.append(error)
    if failed:
        more = f" (and {len(failed) - 3} more)" if len(failed) > 3 else ""
        raise DataError("; ".join(str(error) for error in failed[:3]) + more) from failed[0]
    return tasks


def _load(asked: Asked, options: TaskOptions) -> Task:
    leaf = asked.leaf
    try:
        group = asked.name.rpartition(":")[2] if asked.is_group else None
        task: Task = leaf.load(group, options, asked.default_shots)
        for request in task.requests_of(0):  # whatever a task reads late, it reads here
            if request.images is not None:
                request.images()
    except GemoeError:
        raise
    except Exception as error:  # of any kind: the code of 16,000 tasks
        raise DataError(
            f"--tasks {leaf.task_name}: {label(leaf.harness)} cannot load it "
            f"({in_a_line(error, 300)}); leave it out, or put right what it names"
        ) from error
    return task


def members(names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Sets taken apart: a name, and the examples of its tasks if they do not say."""
    for name in names:
        for member in SETS.get(name, (name,)):
            yield member, _SHOTS.get(member, 0) if name in SETS else 0


def _leaves(known: dict[str, Any], name: str, shots: int) -> list[Asked]:
    harness, _, plain = name.rpartition(":")
    order = [LMMS_EVAL, LM_EVAL] if plain in _VISION else [LM_EVAL, LMMS_EVAL]
    if harness:
        order = [one for one in order if one == harness]
    for one in order:
        leaves, is_group = known[one].leaves(plain)
        if leaves:
            return [Asked(leaf, name, is_group, shots) for leaf in leaves]
    everything = {*SETS, *known[LM_EVAL].everything, *known[LMMS_EVAL].everything}
    if "," in plain and everything.issuperset(plain.split(",")):
        raise ConfigError(f"--tasks {name}: several are separated by blanks, not by commas")
    same = [one for one in everything if one.lower() == plain.lower()]
    near = same or difflib.get_close_matches(plain, sorted(everything), n=3)
    hint = f"; near it are {', '.join(near)}" if near else ""
    raise ConfigError(
        f"--tasks {name}: neither a set ({', '.join(SETS)}) nor a task of {label(LM_EVAL)} or "
        f"{label(LMMS_EVAL)}{hint}"
    )


def _refuse(asked: Iterable[Asked]) -> None:
    """ConfigError that names all tasks that cannot be answered."""
    refused = [(one.leaf.task_name, why) for one in asked if (why := one.leaf.refused)]
    if refused:
        some = "; ".join(f"{task} {why}" for task, why in refused[:5])
        more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise ConfigError(f"--tasks: {some}{more}. Leave them out")
