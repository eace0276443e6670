"""What the Trainer of transformers must do for a converted model beside its own work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemoe_ds.moe.step_context import Assign, Read

if TYPE_CHECKING:
    from gemoe_ds.models.handle import MoEHandle


class AfterStep(TrainerCallback):
    """Calls `handle.after_step` after each step of the optimizer."""

    def __init__(
        self, handle: MoEHandle, assign_: Assign | None = None, read_param: Read | None = None
    ) -> None:
        self.handle, self.assign_, self.read_param = handle, assign_, read_param

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        step = state.global_step + 1  # which Trainer counts after this call
        self.handle.after_step(
            step, state.max_steps, assign_=self.assign_, read_param=self.read_param
        )
