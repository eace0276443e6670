"""What goes on around the steps of a run: one class for each matter, ours and a user's alike."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Tensor

from gemoe_ds.data.collate import Batch
from gemoe_ds.errors import ConfigError

if TYPE_CHECKING:  # a hook of one's own imports this file, and none of these
    from gemoe_ds.config import RunConfig
    from gemoe_ds.data.bad_samples import BadSampleLog
    from gemoe_ds.engine.world import World
    from gemoe_ds.engine.zero import Engine
    from gemoe_ds.models.moe_model import MoEModel


class Training(Protocol):
    """What hooks see of the `Trainer`."""

    config: RunConfig
    model: MoEModel
    engine: Engine
    world: World
    hooks: dict[str, Hook]  # by the name of their state
    step: int  # the last whole one
    updates: int  # of the optimizer, without those that were skipped
    empty_steps: int
    stalled: float  # seconds that saving has kept this rank from training, in all

    def end(self, reason: str) -> None:
        """Take no further step; `reason` ends a line. All ranks must call it at the same step."""

    def block(self, step: int, index: int, num_micro_batches: int) -> int:
        """The number in the run of a micro-batch of this rank and step."""

    def check_bad_samples(self, log: BadSampleLog) -> None:
        """End the run if too many are listed. Collective."""


@dataclass
class StepResult:
    """What a step leaves for the hooks.

    `metrics` are those of all ranks together, at every `monitor.every`th step and the last one;
    else there are none. A hook may add to them, on all ranks alike: the hooks after it see that,
    and the metric writers write it.
    """

    step: int
    tokens: int  # valid ones of this rank
    seconds: float  # of this rank, waiting for data included
    metrics: dict[str, float | Tensor] = field(default_factory=dict)


class Hook:
    """Base of the hooks of a run; override what is needed.

    Every rank has the same hooks, and calls the same methods of them in the same order at the same
    steps. So a hook may use collectives, if it does on every rank; one that does on the first
    rank only makes all ranks wait for ever. After a step the order is: the sample log, validation,
    the hooks of `train.hooks` and of the Python API as they are given, early stopping, the metric
    writers, the checkpoints.
    """

    name: ClassVar[str] = ""  # of its state in checkpoints; by default "module:Class"
    metrics: ClassVar[dict[str, Literal["min", "max"]]] = {}  # that it adds, and what is better

    def before_run(self, trainer: Training) -> None:
        """Before the first step of a run, or of its continuation after `trainer.step`."""

    def before_step(self, trainer: Training, step: int, batches: Sequence[Batch]) -> None:
        """Once the micro-batches of this rank are there; all ranks go on with the step."""

    def after_step(self, trainer: Training, result: StepResult) -> None:
        """After each step. `trainer.end(reason)` makes it the last one, if all ranks call it."""

    def after_run(self, trainer: Training) -> None:
        """After `trainer.step`, the last one; also if all ranks stop early, on a signal for one.

        Not after an error that ends a single rank.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a continuation must know, as JSON has it; equal on all ranks. In each checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before `before_run` of a continuation, if the checkpoint has a state of this hook."""


def by_name(hooks: Sequence[Hook]) -> dict[str, Hook]:
    """Hooks by the name of their state; several of one class are numbered."""
    named: dict[str, Hook] = {}
    for hook in hooks:
        kind = type(hook)
        name = own = hook.name or f"{kind.__module__}:{kind.__qualname__}"
        number = 1
        while name in named:
            number += 1
            name = f"{own}#{number}"
        named[name] = hook
    return named


def load_hooks(paths: Sequence[str]) -> list[Hook]:
    """One of each class of `train.hooks`; ConfigError for a path that leads to none."""
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"train.hooks: {path} stands there twice")
    return [_load(path) for path in paths]


def _load(path: str) -> Hook:
    said = f"train.hooks: {path}"
    module_name, colon, name = path.partition(":")
    if not colon or not all(map(str.isidentifier, [*module_name.split("."), *name.split(".")])):
        raise ConfigError(f"{said}: write it as my_package.my_module:MyHook")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # the last: it hides nothing
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{said}: there is no module {error.name}, neither installed, nor on PYTHONPATH, "
                f"nor in the working directory {here}"
            ) from None
        raise ConfigError(f"{said}: cannot be imported: {error}") from None
    except Exception as error:
        raise ConfigError(f"{said}: cannot be imported: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, vars(found), n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"{said}: {module_name} has no {name}{hint}")
        found = getattr(found, part)
    if not isinstance(found, type) or not issubclass(found, Hook):
        raise ConfigError(f"{said}: is no class that extends gemoe_ds.train.hooks.Hook")
    try:
        return found()
    except Exception as error:
        raise ConfigError(
            f"{said}: cannot be made without arguments: {type(error).__name__}: {error}"
        ) from error
