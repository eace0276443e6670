"""DeepSpeed's JSON file + RunConfig -> the dict for `deepspeed.initialize`, or a clear refusal.

The file holds DeepSpeed's own keys (ZeRO, communication, logging). What the recipe sets as well
may be left out or "auto" there, or must agree. This module does not import deepspeed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from gemoe_ds.config.deepspeed_file import AUTO, FROM_HIDDEN_SIZE, ZERO, DeepSpeedFile
from gemoe_ds.config.deepspeed_sections import check_optimizer, check_scheduler, must_agree
from gemoe_ds.config.schema import RunConfig
from gemoe_ds.errors import ConfigError

_DEFAULT_BUCKET = 5 * 10**8  # DeepSpeed's, elements
_MANY = 64  # ranks
_RECIPE_ONLY = ("bf16", "fp16", "optimizer", "scheduler")
_MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")


def deepspeed_config(
    config: RunConfig, world_size: int, hidden_size: int, *, may_write: bool = True
) -> dict[str, Any]:
    """The file that `config.deepspeed` names, with batch sizes, clipping and "auto" filled in;
    unless it `may_write` without the sections that write metrics.

    Precision stays with the model (`model.dtype`) and the optimizer and its schedule with
    `optim`, so the result has no such section. Raises ConfigError as `check_deepspeed` does.
    """
    check_deepspeed(config, world_size)
    file = config.deepspeed_file
    left_out = _RECIPE_ONLY if may_write else (*_RECIPE_ONLY, *_MONITORS)
    kept = {k: v for k, v in file.options.items() if k not in left_out}
    filled = {key: value for key, (_, value) in _from_recipe(config, world_size).items()}
    result = kept | filled
    if ZERO in kept:
        result[ZERO] = _zero(file, hidden_size)
    if file.stage == 0:
        result["gradient_clipping"] = 0.0  # our optimizer clips there (engine/optimizer.py)
    # Offloading works with torch's AdamW; DeepSpeed's own for CPUs would be compiled at start.
    return {"zero_force_ds_cpu_optimizer": False} | result


def check_deepspeed(config: RunConfig, world_size: int | None) -> list[str]:
    """A line for each option of the file that has no effect; ConfigError for every contradiction.

    Without `world_size` (a run that is only evaluated, on however many ranks) the sizes of batches
    are not compared.
    """
    file = config.deepspeed_file
    for key, (source, value) in _from_recipe(config, world_size).items():
        must_agree(file.name, key, file.options.get(key, AUTO), source, value)
    _check_precision(config, file)
    lines = [*file.ignored, *_about_stage(config, file, world_size)]
    lines += check_optimizer(config, file)
    lines += check_scheduler(config, file)
    _check_sharded_experts(config, file)
    return lines + _check_offload(file)


def _about_stage(config: RunConfig, file: DeepSpeedFile, world_size: int | None) -> Iterator[str]:
    """Why a stage was taken, and what another one would spare."""
    alone = config.model.trainable == "routers"
    if config.deepspeed == AUTO:
        why = (
            "routers alone train, whose optimizer states are small"
            if alone
            else "gradients and optimizer states of what trains are divided over the ranks"
        )
        yield f"deepspeed=auto: ZeRO {file.stage}: {why}"
    if file.stage == 3 and (world_size or 0) >= _MANY:
        other = "zero0, which routers fit" if alone else "zero2, if it fits"
        yield (
            f"slow: {file.name}: ZeRO 3 on {world_size} ranks; every step costs a rank's CPU time "
            f"that grows with the ranks (docs/launching.md); deepspeed={other}"
        )


def summary(config: RunConfig, world_size: int, hidden_size: int) -> str:
    """What the file comes to, on one line."""
    file = config.deepspeed_file
    parts = [f"ZeRO {file.stage}", f"{config.model.dtype}, what trains float32"]
    for part in ("optimizer", "param"):
        device = file.zero.get(f"offload_{part}", {}).get("device", "none")
        parts += [f"{part}{'s' * (part == 'param')} offloaded to {device}"] * (device != "none")
    zero = deepspeed_config(config, world_size, hidden_size).get(ZERO, {})
    sizes = {"reduce_bucket_size": _DEFAULT_BUCKET, "allgather_bucket_size": _DEFAULT_BUCKET}
    if file.stage == 3:
        sizes |= {"stage3_prefetch_bucket_size": 5 * 10**7}
        sizes |= {"stage3_param_persistence_threshold": 10**5}
        del sizes["allgather_bucket_size"]
    if file.stage:
        parts += [f"{name} {zero.get(name, default):,}" for name, default in sizes.items()]
    return f"{file.name}: {'; '.join(parts)}"


def _from_recipe(config: RunConfig, world_size: int | None) -> dict[str, tuple[str, int | float]]:
    """What the recipe sets of DeepSpeed's keys, and where it does; batches for so many ranks."""
    clipping = {"gradient_clipping": ("optim.max_grad_norm", config.optim.max_grad_norm or 0.0)}
    if world_size is None:
        return clipping
    train, accumulation = config.train, config.accumulation_steps(world_size)
    return {
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", train.micro_batch_size),
        "gradient_accumulation_steps": ("train.gradient_accumulation_steps", accumulation),
        "train_batch_size": (
            "train.micro_batch_size * train.gradient_accumulation_steps * ranks",
            train.micro_batch_size * accumulation * world_size,
        ),
        **clipping,
    }


def _zero(file: DeepSpeedFile, hidden_size: int) -> dict[str, Any]:
    """The section with "auto" as Hugging Face's Trainer fills it in."""
    filled = (hidden_size**2, int(0.9 * hidden_size**2), 10 * hidden_size)
    auto = dict(zip(FROM_HIDDEN_SIZE, filled, strict=True))
    return {key: auto[key] if value == AUTO else value for key, value in file.zero.items()}


def _check_precision(config: RunConfig, file: DeepSpeedFile) -> None:
    dtype = config.model.dtype
    for section, enabled in (("bf16", dtype == "bfloat16"), ("fp16", False)):
        stated = file.options.get(section, {})
        stated = AUTO if stated == AUTO else stated.get("enabled", AUTO)
        if stated != AUTO and stated != enabled:
            raise ConfigError(
                f"{file.name}: {section}.enabled={json.dumps(stated)} contradicts "
                f"model.dtype={dtype}; set model.dtype (float32, bfloat16) and remove the section"
            )


def _check_sharded_experts(config: RunConfig, file: DeepSpeedFile) -> None:
    """ZeRO 1 and 2 reduce gradients of experts rightly in one of their ways only."""
    if (
        config.model.trainable == "routers"
        or config.parallel.ep_size == 1
        or file.stage not in (1, 2)
    ):
        return
    for key in ("contiguous_gradients", "reduce_scatter"):
        if file.zero.get(key) is False:
            raise ConfigError(
                f"{file.name}: {ZERO}.{key}=false: with model.trainable={config.model.trainable} "
                f"and parallel.ep_size={config.parallel.ep_size} DeepSpeed would reduce the "
                "gradients of experts over the wrong ranks; remove it"
            )


def _check_offload(file: DeepSpeedFile) -> list[str]:
    lines = []
    for part, stages in (("optimizer", (1, 2, 3)), ("param", (3,))):
        device = file.zero.get(f"offload_{part}", {}).get("device", "none")
        if device == "none":
            continue
        said = f"{ZERO}.offload_{part}"
        if device == "nvme":
            raise ConfigError(
                f"{file.name}: {said}.device=nvme is not supported: "
                "checkpoints read the optimizer's state from memory; use cpu"
            )
        if file.stage not in stages:
            needs = "stage 3" if part == "param" else "stage 1, 2 or 3"
            raise ConfigError(
                f"{file.name}: {said} needs {needs}: with ZeRO {file.stage} nothing would be "
                f"offloaded (ds_configs/zero3_offload.json), or remove it"
            )
        if part == "param":
            lines.append(
                f"{file.name}: {said}: frozen experts stay on the device, as buffers, which "
                "DeepSpeed does not offload; parallel.ep_size in the recipe shards them"
            )
    return lines
