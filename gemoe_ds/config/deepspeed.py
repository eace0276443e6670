"""DeepSpeed's JSON file + RunConfig -> the dict for `deepspeed.initialize`, or a clear refusal.

The file holds DeepSpeed's own keys (ZeRO, communication, logging). What the recipe sets as well
may be left out or "auto" there, or must agree. This module does not import deepspeed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemoe_ds.errors import ConfigError

if TYPE_CHECKING:
    from gemoe_ds.config.tree import RunConfig

AUTO = "auto"
SUPPORTED_STAGES = (0, 1, 2, 3)


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The file that `config.deepspeed` names, with batch sizes and clipping filled in.

    Precision stays with the model (`model.dtype`) and the optimizer and its schedule with
    `optim`, so the result has no such section. Other "auto" values are left to DeepSpeed's
    defaults. Raises ConfigError for an unreadable file and for every contradiction.
    """
    file = config.deepspeed
    options = read_file(file)
    train, accumulation = config.train, config.accumulation(world_size)
    filled: dict[str, tuple[str, int | float]] = {
        "train_micro_batch_size_per_gpu": ("train.micro_batch", train.micro_batch),
        "gradient_accumulation_steps": ("train.accumulation", accumulation),
        "train_batch_size": (
            "train.micro_batch * train.accumulation * ranks",
            train.micro_batch * accumulation * world_size,
        ),
        "gradient_clipping": ("optim.clip_norm", config.optim.clip_norm or 0.0),
    }
    for key, (source, value) in filled.items():
        _must_agree(file, key, options.get(key, AUTO), source, value)
    _check_precision(config, options)
    _check_optimizer(config, options)
    stage = stage_of(file, options)
    _check_offload(file, options)
    if "expert_parallel" in options:
        raise ConfigError(
            f"{file}: expert_parallel: gemoe_ds converts the experts itself; remove the section "
            "and set parallel.ep_size in the recipe"
        )
    kept = {k: v for k, v in options.items() if k not in ("bf16", "fp16", "optimizer")}
    result = _without_auto(kept) | {key: value for key, (_, value) in filled.items()}
    if stage == 0:
        result["gradient_clipping"] = 0.0  # our optimizer clips there (engine/optimizer.py)
    # Offloading works with torch's AdamW; DeepSpeed's own for CPUs would be compiled at start.
    return {"zero_force_ds_cpu_optimizer": False} | result


def read_file(path: str) -> dict[str, Any]:
    """The JSON object in a DeepSpeed file; ConfigError if there is none."""
    try:
        options = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"deepspeed={path}: cannot read it: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"deepspeed={path}: not valid JSON: {error}") from None
    if not isinstance(options, dict):
        raise ConfigError(f"deepspeed={path}: must hold a JSON object, got {options!r:.40}")
    return options


def _must_agree(file: str, key: str, stated: object, source: str, value: object) -> None:
    if stated != AUTO and stated != value:
        raise ConfigError(
            f'{file}: {key}={stated} contradicts {source}={value} of the recipe; write "auto" there'
        )


def _check_precision(config: RunConfig, options: dict[str, Any]) -> None:
    dtype = config.model.dtype
    for section, enabled in (("bf16", dtype == "bfloat16"), ("fp16", False)):
        stated = _section(config.deepspeed, options, section).get("enabled", AUTO)
        if stated != AUTO and stated != enabled:
            raise ConfigError(
                f"{config.deepspeed}: {section}.enabled={json.dumps(stated)} contradicts "
                f"model.dtype={dtype}; set model.dtype (float32, bfloat16) and remove the section"
            )


def _check_optimizer(config: RunConfig, options: dict[str, Any]) -> None:
    file, optim = config.deepspeed, config.optim
    if "scheduler" in options:
        raise ConfigError(
            f"{file}: scheduler: the recipe sets it (optim.schedule); remove the section"
        )
    stated = _section(file, options, "optimizer")
    _must_agree(file, "optimizer.type", stated.get("type", AUTO), "the optimizer", "AdamW")
    known = {
        "lr": optim.lr,
        "betas": list(optim.betas),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }
    for key, value in _section(file, stated, "params").items():
        if key not in known:
            raise ConfigError(
                f"{file}: optimizer.params.{key}: the recipe sets the optimizer; remove it"
            )
        _must_agree(file, f"optimizer.params.{key}", value, f"optim.{key}", known[key])


def _check_offload(file: str, options: dict[str, Any]) -> None:
    zero = _section(file, options, "zero_optimization")
    if "offload_param" in zero:
        raise ConfigError(
            f"{file}: zero_optimization.offload_param: frozen experts are buffers, which DeepSpeed "
            "does not offload; remove it and raise parallel.ep_size, which shards them"
        )
    device = _section(file, zero, "offload_optimizer").get("device", "none")
    if device == "cpu" and zero.get("stage", 0) == 0:
        raise ConfigError(
            f"{file}: zero_optimization.offload_optimizer needs stage 1, 2 or 3: without ZeRO "
            "nothing would be offloaded (ds_configs/zero2_offload.json)"
        )
    if device not in ("none", "cpu", AUTO):
        raise ConfigError(
            f"{file}: zero_optimization.offload_optimizer.device={device} is not supported: "
            "checkpoints read the optimizer's state from memory; use cpu"
        )


def stage_of(file: str, options: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed file asks for; ConfigError unless it is supported."""
    stage = _section(file, options, "zero_optimization").get("stage", 0)
    if stage not in SUPPORTED_STAGES:
        raise ConfigError(
            f"{file}: zero_optimization.stage={stage}: should be one of "
            f"{', '.join(map(str, SUPPORTED_STAGES))}"
        )
    return int(stage)


def _section(file: str, options: dict[str, Any], key: str) -> dict[str, Any]:
    section = options.get(key, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{file}: {key} must be an object, got {section!r:.40}")
    return section


def _without_auto(options: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in options.items()
        if value != AUTO
    }
