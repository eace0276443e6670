"""The options of `data`: what is trained on, and how it is read."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from gemoe_ds.config.numbers import NonNegative
from gemoe_ds.config.train_path import parts_of
from gemoe_ds.data.mixture import MixturePart
from gemoe_ds.data.prefetch import PREFETCH_BYTES
from gemoe_ds.errors import ConfigError
from gemoe_ds.registry import ConfigModel, Reads


class DataConfig(ConfigModel):
    train_path: Annotated[str | tuple[MixturePart, ...], Reads()] = Field(
        description="training data: a folder written by `gemoe data convert`, or a list of such "
        "folders that are mixed"
    )
    validation_path: Annotated[str | None, Reads()] = Field(
        None, description="such a folder, held out, for train.eval_every and budgets; null: none"
    )
    holdout: NonNegative = Field(
        0,
        description="training samples that are never trained on, but evaluated by "
        "train.eval_every: a number, or below 1 a share such as 0.01; 0: none",
    )
    tokenizer: Annotated[str, Reads(of_hub="tokenizer")] = Field(
        description="Hugging Face tokenizer: a folder, or owner/name[@revision] in the Hub cache"
    )
    max_length: int = Field(2048, ge=2, description="tokens per sequence")
    too_long: Literal["cut", "drop", "stop"] = Field(
        "cut",
        description="training samples of more tokens. cut: at the last answer that fits; drop: not "
        "trained on; stop: refuse the run",
    )
    group_by_length: bool = Field(
        False, description="samples of like length in a step: little padding, ranks equally busy"
    )
    pack: bool = Field(
        False,
        description="rows of max_length tokens, filled with several samples that do not see each "
        "other; for data without pictures. A row counts as one of the global batch",
    )
    num_workers: int = Field(2, ge=1, description="reader threads per rank")
    prefetch_bytes: int = Field(
        PREFETCH_BYTES,
        ge=1,
        description="of the micro-batches that a rank makes ahead of their step, at most; one is "
        "always made",
    )
    max_bad_samples: NonNegative = Field(
        10,
        description="bad samples that are left out before the run stops: a number over all ranks, "
        "or below 1 a share of the data. Bad: broken image, or no target within max_length",
    )

    @field_validator("train_path", mode="before")
    @classmethod
    def _a_folder_or_parts(cls, value: object) -> object:
        return value if isinstance(value, str) else parts_of(value)

    @field_validator("max_bad_samples", "holdout", mode="before")
    @classmethod
    def _no_truth(cls, value: object) -> object:
        if isinstance(value, bool) or (isinstance(value, str) and value.endswith("%")):
            raise ConfigError(f"{value} is neither a number nor a share such as 0.01")
        return value

    @field_validator("max_bad_samples", "holdout")
    @classmethod
    def _number_or_share(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ConfigError(f"{value:g} is neither a whole number nor a share below 1")
        return int(value) if value == int(value) else value

    @property
    def is_validated(self) -> bool:
        """Whether there are samples to validate on."""
        return self.validation_path is not None or self.holdout > 0

    @model_validator(mode="after")
    def _full_or_alike(self) -> Self:
        if self.pack and self.group_by_length:
            raise ConfigError(
                "data.pack=true and data.group_by_length=true: packed rows are all full, and there "
                "is nothing to group; set one of them to false"
            )
        return self

    @model_validator(mode="after")
    def _one_held_out_set(self) -> Self:
        if self.holdout and self.validation_path is not None:
            raise ConfigError(
                f"data.holdout={self.holdout:g} and data.validation_path={self.validation_path}: "
                "both name the samples to validate on; set only one of them"
            )
        return self
