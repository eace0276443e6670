"""All that was answered, mode by mode and task by task, through the stock evaluators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemoe_ds.analysis.benchmarks.collect import find_modes
from gemoe_ds.errors import ConfigError, DataError
from gemoe_ds.evaluation.benchmarks import code
from gemoe_ds.evaluation.benchmarks.answered import ANSWERS, ASKED, AnsweredTask
from gemoe_ds.evaluation.benchmarks.harnesses import LM_EVAL, LMMS_EVAL
from gemoe_ds.evaluation.benchmarks.load_tasks import resolve
from gemoe_ds.evaluation.benchmarks.local_data import DataPlaces, data_of
from gemoe_ds.evaluation.benchmarks.needs import (
    check_needs,
    configure_judge,
    needs_judge,
    runs_code,
)
from gemoe_ds.evaluation.benchmarks.prompt_styles.style import PromptStyle


@dataclass(frozen=True)
class ScoreOptions:
    tasks: Sequence[str] = ()  # sets, groups and tasks; none: all that are answered
    may_run_code: bool = False
    judge: str | None = None
    data: DataPlaces = DataPlaces()


def score_all(
    folders: Sequence[Path], options: ScoreOptions, say: Callable[[str], None]
) -> list[Path]:
    """The folders of the tasks that were scored. Whatever is missing is said before any is."""
    modes = [_answered(mode.resolve()) for mode in find_modes(folders)]
    if options.tasks:
        wanted = {(one.leaf.harness, one.leaf.task_name) for one in resolve(options.tasks)}
        modes = [[one for one in mode if (one.harness, one.name) in wanted] for mode in modes]
    answered = [one for mode in modes for one in mode]
    if not answered:
        raise DataError(
            f"{folders[0]}: no answers{' to these tasks' if options.tasks else ''}: run `gemoe "
            "benchmark answer` first"
        )
    names = dict.fromkeys(f"{one.harness}:{one.name}" for one in answered)
    leaves = {(one.leaf.harness, one.leaf.task_name): one.leaf for one in _leaves(list(names))}
    check_needs(leaves.values(), may_run_code=options.may_run_code, judge=options.judge)
    for one in answered:
        assert one.answers  # read, and counted
    if options.judge is not None and any(map(needs_judge, leaves.values())):
        configure_judge(options.judge)
    if code.refused() is not None and any(map(runs_code, leaves.values())):
        say(f"warning: {code.refused()}")
    done: list[Path] = []
    with data_of(list(leaves.values()), options.data):
        for mode in modes:
            for scored in _score_mode(mode, leaves, options):
                done.append(scored.answered.folder)
                _tell(scored, say)
    return done


def _answered(mode: Path) -> list[AnsweredTask]:
    folders = [path.parent for path in sorted(mode.glob(f"*/{ANSWERS}"))]
    return [AnsweredTask.read(path) for path in folders if (path / ASKED).exists()]


def _leaves(names: Sequence[str]) -> list[Any]:
    try:
        return resolve(names)
    except ConfigError as error:  # answered by another version of a harness
        raise DataError(f"what was answered: {error}") from error


def _score_mode(
    mode: Sequence[AnsweredTask], leaves: dict[tuple[str, str], Any], options: ScoreOptions
) -> Iterator[Any]:
    from gemoe_ds.evaluation.benchmarks.scoring import score_language, score_vision

    by_group: dict[tuple[str | None, str], list[tuple[AnsweredTask, Any]]] = {}
    for one in mode:
        leaf = leaves[one.harness, one.name]
        if one.harness == LMMS_EVAL:
            style = PromptStyle.named(one.choices.get("prompt_style", "default"))()
            yield score_vision(one, leaf, style, options.judge)
        else:
            alike = str(sorted(one.choices.items()))
            by_group.setdefault((one.group, alike), []).append((one, leaf))
    for (group, _), parts in by_group.items():
        if group is not None and _is_whole(group, parts):
            yield from score_language(parts, group, judge=options.judge)
        else:
            for part in parts:
                yield from score_language([part], None, judge=options.judge)


def _is_whole(group: str, parts: Sequence[tuple[AnsweredTask, Any]]) -> bool:
    wanted = {one.leaf.task_name for one in resolve([f"{LM_EVAL}:{group}"])}
    return wanted == {answered.name for answered, _ in parts}


def _tell(scored: Any, say: Callable[[str], None]) -> None:
    folder = scored.answered.folder
    numbers = [
        f"{key} {value:.4f}" for key, value in scored.scores.metrics.items() if "stderr" not in key
    ]
    say(f"{folder.parent.name}/{folder.name}: {', '.join(numbers)}")
    for warning in scored.warnings:
        say(f"warning: {folder.parent.name}/{warning}")
