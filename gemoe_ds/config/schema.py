"""The options of a run as pydantic models; every default of the project's own knobs stands here.

Router and backbone options live with their classes, as the nested `Config`; `model.router` and
`model.backbone` name a registered class and hold that class's options beside the name.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    Field,
    PrivateAttr,
    field_serializer,
    field_validator,
    model_validator,
)

from gemoe_ds.config.choices import BackboneChoice, RouterChoice
from gemoe_ds.config.data_options import DataConfig
from gemoe_ds.config.deepspeed_file import AUTO, DeepSpeedFile, in_base64, read_deepspeed_file
from gemoe_ds.config.numbers import Fraction, Momentum, NonNegative, Positive
from gemoe_ds.config.paths import Places, check_output, inputs, located, shipped
from gemoe_ds.config.train_options import TrainConfig
from gemoe_ds.errors import ConfigError
from gemoe_ds.registry import ConfigModel, Reads


class ModelConfig(ConfigModel):
    backbone: BackboneChoice = Field(
        description="model architecture, with its own options beside the name"
    )
    checkpoint: Annotated[str | None, Reads(of_hub="model")] = Field(
        None,
        description="base model: a Hugging Face folder, or owner/name[@revision] in the local Hub "
        "cache; null: random weights, for pretraining",
    )
    read: Literal["auto", "once", "per_host"] = Field(
        "auto",
        description="which hosts read the base model's weights. per_host: each; once: one, the "
        "others receive them; auto: once if the folder lies on a network",
    )
    router: RouterChoice = Field(description="routing method, with its own options beside the name")
    trainable: Literal["routers", "experts", "all"] = Field(
        "routers",
        description="which weights train. routers: everything else is frozen; experts: routers "
        "and experts; all: every weight, for pretraining",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="dtype of activations and frozen weights; trainable weights stay float32",
    )
    experts_dtype: Literal["float8", "int8", "nf4"] | None = Field(
        None,
        description="frozen experts in fewer bits, quantised while they are read: float8, int8 (8 "
        "bits) or nf4 (4 bits); null: in dtype",
    )
    dense_dtype: Literal["float8", "int8", "nf4"] | None = Field(
        None,
        description="the same of the linear maps of attention, shared experts, head and vision "
        "tower, where they do not train; embeddings, norms and convolutions stay in dtype",
    )
    gate_gradient: Literal["chosen", "dense"] = Field(
        "chosen", description="dense: gates learn from all experts (DenseMixer), for more time"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )
    compile: Literal["none", "dense"] = Field(
        "none",
        description="dense: torch.compile of attention, norms and vision blocks in training; the "
        "first step takes a minute more",
    )
    pack_experts: bool = Field(
        False, description="CPU only: faster frozen bfloat16 experts, for two more copies of them"
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_float16(cls, value: object) -> object:
        if value in ("float16", "fp16", "half"):
            raise ConfigError(
                "float16 is refused: its loss must be scaled, which beside float32 routers only "
                "DeepSpeed's torch_autocast could do, and on GPUs without bfloat16 (before 8.0) "
                "the grouped product of the experts runs out of registers; use bfloat16, or "
                "float32 there"
            )
        return value

    @model_validator(mode="after")
    def _routers_need_weights(self) -> Self:
        if self.trainable != "all" and self.checkpoint is None:
            raise ConfigError(
                f"model.checkpoint: model.trainable={self.trainable} starts from pretrained "
                "weights; give their folder, or model.trainable=all to pretrain from random ones"
            )
        return self

    @model_validator(mode="after")
    def _few_bits_are_frozen(self) -> Self:
        if self.dense_dtype and self.trainable == "all":
            raise ConfigError(
                f"model.dense_dtype={self.dense_dtype}: weights in few bits cannot train; set it "
                "to null, or model.trainable=routers or experts (it is all)"
            )
        if self.dense_dtype and self.compile != "none":
            raise ConfigError(
                f"model.dense_dtype={self.dense_dtype} and model.compile={self.compile}: torch's "
                "compiler does not see into weights in few bits; leave one of the two out"
            )
        if self.experts_dtype and self.trainable != "routers":
            raise ConfigError(
                f"model.experts_dtype={self.experts_dtype}: experts in few bits cannot train; set "
                f"it to null, or model.trainable=routers (it is {self.trainable})"
            )
        if self.experts_dtype and self.pack_experts:
            raise ConfigError(
                f"model.experts_dtype={self.experts_dtype} and model.pack_experts=true: packed "
                "experts are two more copies in bfloat16; leave one of the two out"
            )
        return self

    @field_serializer("backbone")
    def _encode_backbone(self, backbone: BackboneChoice) -> dict[str, Any]:
        # A checkpoint brings its own shapes; a defaulted one, written out, would contradict it.
        return backbone.flat(only_set=self.checkpoint is not None)


class OptimConfig(ConfigModel):
    lr: Positive = Field(description="peak learning rate of AdamW")
    predictor_lr: Positive | None = Field(
        None, description="peak rate of router weights other than the gate (GeMoE's EAP); null: lr"
    )
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay of AdamW")
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.999), description="betas of AdamW")
    eps: Positive = Field(1e-8, description="epsilon of AdamW")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from zero")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="lr after the warm-up")
    min_lr_ratio: Fraction = Field(0.0, description="cosine: final lr / peak lr")
    max_grad_norm: Positive | None = Field(
        1.0, description="clip the global gradient norm to this; null: no clipping"
    )


class ParallelConfig(ConfigModel):
    ep_size: int | Literal["auto"] = Field(
        1,
        description="expert-parallel ranks: this many share one copy of the experts; auto: as few "
        "as fit into memory, inside a host",
    )

    @field_validator("ep_size", mode="before")
    @classmethod
    def _number_or_auto(cls, value: object) -> object:
        if value != AUTO and (type(value) is not int or value < 1):
            raise ConfigError(f"{value!r} should be a whole number from 1 on, or 'auto'")
        return value


class CheckpointConfig(ConfigModel):
    every: int = Field(500, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="how many of the newest checkpoints stay")
    keep_best: str | None = Field(
        None,
        min_length=1,
        description="metric that says which evaluation is the best, whose checkpoint stays too: "
        "validation/loss, validation/accuracy, validation/mean_k; null: none",
    )
    keep_best_mode: Literal["min", "max"] | None = Field(
        None, description="what is better; null: less loss and k, more accuracy"
    )


class MonitorConfig(ConfigModel):
    every: int = Field(10, ge=1, description="steps between metrics")
    tensorboard: bool = Field(True, description="write TensorBoard events as well")
    wandb: str | None = Field(
        None,
        min_length=1,
        description="project of Weights & Biases to write metrics to as well; null: none",
    )
    sample_log: bool = Field(False, description="log which samples each step saw (sample_log/)")
    stall_seconds: Positive | None = Field(
        120.0,
        description="seconds without progress after which a rank is named and all ranks end; "
        "null: no limit",
    )


class RunConfig(ConfigModel):
    """Everything that a training run depends on, besides the files that it names."""

    seed: int = Field(0, ge=0, lt=2**31, description="seed of the data order and of new weights")
    output_dir: str = Field(description="folder for checkpoints, metrics, resolved recipe")
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    deepspeed: Annotated[str, Reads(shipped="ds_configs", words=(AUTO,))] = Field(
        "ds_configs/zero2.json",
        description="DeepSpeed's JSON file, its content in base64, or the name of one that ships: "
        "zero0 to zero3, zero1_offload to zero3_offload; auto: zero0 for routers alone, else zero2",
    )
    resume: Annotated[str, Reads(words=("none", "auto"))] = Field(
        "none", description="none: a new run; auto: newest checkpoint in output_dir; or a folder"
    )
    start_from: Annotated[str | None, Reads()] = Field(
        None, description="checkpoint that resume=auto begins with where output_dir has none"
    )
    _places: Places = PrivateAttr(default_factory=Places.beside)  # where its paths are looked for
    _num_steps: int | None = PrivateAttr(None)  # what train.epochs comes to

    @field_validator("output_dir")
    @classmethod
    def _a_folder(cls, value: str) -> str:
        if not value.strip() or "\n" in value or "\0" in value:
            raise ConfigError(f"{value!r} is no folder's name; give the folder of this run")
        return os.path.expanduser(value)

    @model_validator(mode="after")
    def _one_batch_size(self) -> Self:
        if (
            self.train.gradient_accumulation_steps is not None
            and self.train.global_batch_size is not None
        ):
            raise ConfigError(
                f"train.gradient_accumulation_steps={self.train.gradient_accumulation_steps} and "
                f"train.global_batch_size={self.train.global_batch_size}: set only one of them"
            )
        return self

    @model_validator(mode="after")
    def _has_what_it_evaluates(self) -> Self:
        train, keep_best = self.train, self.checkpoint.keep_best
        if train.eval_every and not self.data.is_validated:
            raise ConfigError(
                f"train.eval_every={train.eval_every}: needs data.validation_path, a folder of "
                "held-out samples, or data.holdout, a share of the training data; set one, or "
                "train.eval_every=0"
            )
        if self.checkpoint.keep_best_mode and keep_best is None:
            raise ConfigError(
                f"checkpoint.keep_best_mode={self.checkpoint.keep_best_mode}: goes with "
                "checkpoint.keep_best=METRIC"
            )
        asks = f"train.early_stop={train.early_stop}" if train.early_stop else ""
        asks = f"checkpoint.keep_best={keep_best}" if keep_best else asks
        if asks and not train.eval_every and (keep_best or "validation/").startswith("validation/"):
            raise ConfigError(
                f"{asks}: nothing is evaluated; set train.eval_every to the steps between "
                "evaluations"
            )
        return self

    @model_validator(mode="after")
    def _teacher_stays(self) -> Self:
        if self.train.distill and self.model.trainable != "routers":
            raise ConfigError(
                f"train.distill: model.trainable={self.model.trainable} changes the teacher, which "
                "is the backbone; set model.trainable=routers, or train.distill=null"
            )
        return self

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        steps, epochs = self.train.steps, self.train.epochs
        if steps is None and epochs is None:
            raise ConfigError(
                "train.steps: missing; set it in the recipe or as train.steps=VALUE, or set "
                "train.epochs"
            )
        if steps is not None and epochs is not None:
            raise ConfigError(
                f"train.steps={steps} and train.epochs={epochs:g}: set only one of them (the other "
                "one null)"
            )
        if steps is not None:
            self._check_warmup(steps, f"train.steps={steps}")
        return self

    def _check_warmup(self, steps: int, said: str) -> None:
        if self.optim.warmup_steps > steps:
            raise ConfigError(
                f"optim.warmup_steps={self.optim.warmup_steps} exceeds {said}; shorten the warm-up "
                "or train longer"
            )

    def with_num_steps(self, steps: int) -> Self:
        """The same run of so many steps, where `train.epochs` says how many."""
        if self.train.epochs is None:
            return self
        self._check_warmup(steps, f"the {steps} steps of train.epochs={self.train.epochs:g}")
        counted = self.model_copy()
        counted._num_steps = steps
        return counted

    @property
    def known_steps(self) -> int | None:
        """Of the whole run; None where `train.epochs` is not counted yet."""
        return self.train.steps or self._num_steps

    @property
    def num_steps(self) -> int:
        """Of the whole run; of `train.epochs` once the samples are counted."""
        assert self.known_steps is not None, "train.epochs is counted before anything asks for it"
        return self.known_steps

    @property
    def ep_size(self) -> int:
        """Of the run; of `auto` once the memory of its ranks is known."""
        ep_size = self.parallel.ep_size
        assert isinstance(ep_size, int), "auto is settled before anything asks for it"
        return ep_size

    def with_ep_size(self, ep_size: int) -> Self:
        """The same run with so many ranks that share the experts."""
        return self.model_copy(update={"parallel": ParallelConfig(ep_size=ep_size)})

    def with_deepspeed(self, name: str) -> Self:
        """The same run with a DeepSpeed file that ships."""
        changed = self.model_copy(update={"deepspeed": str(shipped("ds_configs")[name])})
        changed.__dict__.pop("deepspeed_file", None)  # what was read of the other one
        return changed

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of a rank and step; ConfigError if the global batch does not fit."""
        train = self.train
        if train.global_batch_size is None:
            return train.gradient_accumulation_steps or 1
        at_once = train.micro_batch_size * world_size
        if train.global_batch_size % at_once:
            raise ConfigError(
                f"train.global_batch_size={train.global_batch_size} is not a multiple of "
                f"train.micro_batch_size * ranks = {train.micro_batch_size} * {world_size}; "
                "change one of the three"
            )
        return train.global_batch_size // at_once

    @cached_property
    def deepspeed_file(self) -> DeepSpeedFile:
        """What the DeepSpeed file says, read once; ConfigError if it cannot be read or used."""
        if self.deepspeed != AUTO:
            return read_deepspeed_file(self.deepspeed)
        name = "zero0" if self.model.trainable == "routers" else "zero2"
        return read_deepspeed_file(str(shipped("ds_configs")[name]))

    @property
    def zero_stage(self) -> int:
        return self.deepspeed_file.stage

    def dump_yaml(self) -> str:
        """The resolved recipe; loading it gives an equal run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)

    def validate_world(self, world_size: int) -> None:
        """Raise ConfigError for what does not fit `world_size` ranks."""
        ep_size = self.parallel.ep_size
        if isinstance(ep_size, int) and world_size % ep_size:
            fitting = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
            raise ConfigError(
                f"parallel.ep_size={ep_size} does not divide the {world_size} ranks of this run; "
                f"possible: {', '.join(fitting)}, or start another number of ranks"
            )
        self.accumulation_steps(world_size)

    def located(self, places: Places) -> Self:
        """The same run with the absolute path of every input that is found in one of `places`."""
        found = located(self, places)
        found._places = places
        return found

    def check_paths(self, *keys: str) -> None:
        """Raise ConfigError for the first input (of all, or under these keys) that is not there."""
        for key, text, reads in inputs(self):
            is_path = key != "deepspeed" or not in_base64(text)
            if is_path and (not keys or key.startswith(keys)):
                self._places.locate(key, text, reads)
        if not keys:
            check_output(self.output_dir)
