"""Checkpoints while training goes on: the newest ones, the best one, and that of the last step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from gemoe_ds.checkpoint.manifest import BEST, read
from gemoe_ds.checkpoint.writer import Saver
from gemoe_ds.engine.world import gather_objects
from gemoe_ds.errors import CheckpointError, ConfigError
from gemoe_ds.progress import PROGRESS
from gemoe_ds.train.early_stop import Best
from gemoe_ds.train.hooks import Hook, StepResult, Training


class Saving(Hook):
    """Saves every `checkpoint.every` steps (0: never), after each step that is the `best` one so
    far, and at the end of the run."""

    name = "saving"

    def __init__(self, saver: Saver, every: int, best: Best | None) -> None:
        self.saver, self.every, self.best = saver, every, best
        self.saved = 0  # the step of the newest checkpoint

    def before_run(self, trainer: Training) -> None:
        self.saved = trainer.step
        _states(trainer)
        if best := self.best:
            kept = gather_objects(_kept(self.saver.root / BEST))[0]
            if kept is None:
                best.value = None  # gone with an abandoned stretch, or deleted
            elif kept and best.value is None:  # of a run before the last, which asked for none
                best.load_state_dict(kept)

    def after_step(self, trainer: Training, result: StepResult) -> None:
        is_best = bool(self.best and self.best.update(result))
        if is_best or (self.every and result.step % self.every == 0):
            began = time.perf_counter()
            self._save(trainer, is_best=is_best)
            trainer.stalled += time.perf_counter() - began

    def after_run(self, trainer: Training) -> None:
        if trainer.step > self.saved:
            self._save(trainer)
        PROGRESS.enter("saving")
        self.saver.wait()

    def _save(self, trainer: Training, *, is_best: bool = False) -> None:
        PROGRESS.enter("saving")
        self.saver.save(
            trainer.step,
            trainer.updates,
            trainer.empty_steps,
            hooks=_states(trainer),
            is_best=is_best,
        )
        self.saved = trainer.step

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best.state_dict()} if self.best else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.best:
            self.best.load_state_dict(state["best"])


def _kept(folder: Path) -> dict[str, Any] | None:
    """The best value as the best checkpoint has it; {} if it does not say, None without one."""
    if not folder.exists():
        return None
    try:
        states = read(folder).manifest.get("hooks", {})
    except CheckpointError:
        return {}
    found: dict[str, Any] = states.get(Saving.name, {}).get("best", {})
    return found


def _states(trainer: Training) -> dict[str, dict[str, Any]]:
    """What the hooks want to be told when the run goes on, by name."""
    states = {}
    for name, hook in trainer.hooks.items():
        if state := hook.state_dict():
            try:
                json.dumps(state)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"hook {name}: its state cannot be saved: {error}") from error
            states[name] = state
    return states
