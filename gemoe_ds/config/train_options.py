"""The options of the steps: how many, of how many samples, and what goes on beside them."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from gemoe_ds.config.numbers import Positive
from gemoe_ds.errors import ConfigError
from gemoe_ds.models.distill import Distill
from gemoe_ds.registry import ConfigModel


class TrainConfig(ConfigModel):
    steps: int | None = Field(
        None, ge=1, description="optimizer steps; null: train.epochs says how many"
    )
    epochs: Positive | None = Field(
        None,
        description="passes over the training data, in the place of steps; the last step is filled "
        "up from the next pass",
    )
    micro_batch_size: int = Field(ge=1, description="samples per rank in one forward pass")
    gradient_accumulation_steps: int | None = Field(
        None,
        ge=1,
        description="micro-batches per rank and step; null: set by global_batch_size, else 1",
    )
    global_batch_size: int | None = Field(
        None,
        ge=1,
        description="samples per step over all ranks; sets the gradient accumulation",
    )
    auxiliary_batch_size: int | None = Field(
        None,
        ge=1,
        description="samples that share an auxiliary loss, a divisor of micro_batch_size; null: "
        "micro_batch_size",
    )
    max_skipped_steps: int = Field(
        10,
        ge=0,
        description="steps that may be skipped for a NaN or Inf, counted from each start; at more "
        "the run saves and stops",
    )
    eval_every: int = Field(
        0,
        ge=0,
        description="steps between evaluations on data.validation_path or data.holdout; 0: none",
    )
    compare_untouched: bool = Field(
        True, description="evaluate the untouched backbone at the same mean k, too (routers only)"
    )
    early_stop: int = Field(
        0, ge=0, description="evaluations in a row without a new best that end the run; 0: never"
    )
    distill: Distill | None = Field(
        None, description="the backbone as it was, at its own k, teaches the routers; null: none"
    )
    hooks: tuple[str, ...] = Field(
        (), description="classes of your own hooks by import path, [my_package.my_module:MyHook]"
    )

    @model_validator(mode="after")
    def _whole_auxiliary_batches(self) -> Self:
        if self.micro_batch_size % self.loss_batch_size:
            raise ConfigError(
                f"train.auxiliary_batch_size={self.auxiliary_batch_size} does not divide "
                f"train.micro_batch_size={self.micro_batch_size}; set a divisor of it"
            )
        return self

    @property
    def loss_batch_size(self) -> int:
        """Samples that share an auxiliary loss."""
        return self.auxiliary_batch_size or self.micro_batch_size
