"""The best value of a metric so far, and the end of a run that finds no better one."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any, Literal

from gemoe_ds.config import RunConfig
from gemoe_ds.errors import ConfigError
from gemoe_ds.train.hooks import Hook, StepResult, Training


class Best:
    """Of one metric; NaN is never the best."""

    def __init__(self, metric: str, mode: Literal["min", "max"]) -> None:
        self.metric, self.mode = metric, mode
        self.value: float | None = None
        self.step = 0

    def update(self, result: StepResult) -> bool | None:
        """Whether the step has the best value yet; None if it has no value."""
        if self.metric not in result.metrics:
            return None
        value, before = float(result.metrics[self.metric]), self.value
        if math.isnan(value):
            return False
        if before is None or (value > before if self.mode == "max" else value < before):
            self.value, self.step = value, result.step
            return True
        return False

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Unless it is of another metric."""
        if (state["metric"], state["mode"]) == (self.metric, self.mode):
            self.value, self.step = state["value"], state["step"]


def best_of(config: RunConfig, hooks: Sequence[Hook]) -> Best | None:
    """For `checkpoint.keep_best` and `train.early_stop`; None if nothing is asked for.

    ConfigError if none of the hooks has this metric.
    """
    if not (config.checkpoint.keep_best or config.train.early_stop):
        return None
    metric = config.checkpoint.keep_best or "validation/loss"
    modes = {name: mode for hook in hooks for name, mode in hook.metrics.items()}
    if metric not in modes:
        near = difflib.get_close_matches(metric, modes, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"checkpoint.keep_best={metric}: no hook of this run has such a metric; there are: "
            f"{', '.join(modes) or 'none'}{hint}"
        )
    return Best(metric, config.checkpoint.keep_best_mode or modes[metric])


def early_stops(config: RunConfig, hooks: Sequence[Hook]) -> list[EarlyStop]:
    """One, or none."""
    best = best_of(config, hooks)
    return [EarlyStop(best, config.train.early_stop)] if best and config.train.early_stop else []


class EarlyStop(Hook):
    """Ends the run after `train.early_stop` evaluations in a row without a better value."""

    name = "early_stop"

    def __init__(self, best: Best, patience: int) -> None:
        self.best, self.patience = best, patience
        self.waited = 0  # evaluations since the best one

    def before_run(self, trainer: Training) -> None:
        self._end_if_due(trainer)

    def after_step(self, trainer: Training, result: StepResult) -> None:
        is_better = self.best.update(result)
        if is_better is not None:
            self.waited = 0 if is_better else self.waited + 1
            self._end_if_due(trainer)

    def _end_if_due(self, trainer: Training) -> None:
        if self.waited >= self.patience:
            best = self.best
            found = (
                "never a number" if best.value is None else f"{best.value:.6g}, step {best.step}"
            )
            trainer.end(
                f"{best.metric} has not improved in {self.waited} evaluations "
                f"(train.early_stop={self.patience}); the best was {found}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"waited": self.waited, "best": self.best.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best.load_state_dict(state["best"])
        self.waited = state["waited"] if self.best.value is not None else 0
