"""The `optimizer` and `scheduler` sections of a DeepSpeed file against the recipe's `optim`.

Each may be filled with "auto", as Hugging Face's Trainer wants it, or must say what the recipe
says: neither section reaches DeepSpeed.
"""

from __future__ import annotations

import difflib
from typing import Any

from gemoe_ds.config.deepspeed_file import AUTO, DeepSpeedFile
from gemoe_ds.config.deepspeed_values import is_number
from gemoe_ds.config.schema import RunConfig
from gemoe_ds.errors import ConfigError

# DeepSpeed's schedulers by what they come to; the others have nothing like them here
_SCHEDULES = {"warmuplr": "constant", "warmupcosinelr": "cosine"}


def must_agree(file: str, key: str, stated: Any, source: str, value: Any) -> None:
    """ConfigError unless the file says "auto" or what the recipe says."""
    if stated == AUTO or _equal(stated, value):
        return
    raise ConfigError(
        f"{file}: {key}={_plain(stated)} contradicts {source}={_plain(value)} of the recipe; write "
        '"auto" there'
    )


def check_optimizer(config: RunConfig, file: DeepSpeedFile) -> list[str]:
    section, params = _section_and_params(file, "optimizer")
    if section is None:
        return []
    kind, optim = section.get("type", "AdamW"), config.optim
    # DeepSpeed's Adam is AdamW unless adam_w_mode says otherwise
    if str(kind).lower() not in ("adamw", "adam"):
        must_agree(file.name, "optimizer.type", kind, "the optimizer", "AdamW")
    known: dict[str, tuple[str, Any]] = {
        "lr": ("optim.lr", optim.lr),
        "betas": ("optim.betas", list(optim.betas)),
        "eps": ("optim.eps", optim.eps),
        "weight_decay": ("optim.weight_decay", optim.weight_decay),
        "max_grad_norm": ("optim.max_grad_norm", optim.max_grad_norm or 0.0),
        "adam_w_mode": ("AdamW", True),
        "bias_correction": ("AdamW", True),
        "amsgrad": ("AdamW", False),
        "maximize": ("AdamW", False),
    }
    how = {"torch_adam", "fused", "foreach"}  # how it is computed: the same steps
    _check_params(file, "optimizer", params, known, how)
    lines = [
        f"{file.name}: optimizer.params.{name}={_plain(params[name])} is ignored: torch's AdamW "
        "steps, as it comes"
        for name in sorted(how & params.keys())
        if (name, params[name]) != ("torch_adam", True) and params[name] != AUTO
    ]
    return lines


def check_scheduler(config: RunConfig, file: DeepSpeedFile) -> list[str]:
    section, params = _section_and_params(file, "scheduler")
    if section is None:
        return []
    optim, kind = config.optim, section.get("type", AUTO)
    known: dict[str, tuple[str, Any]] = {
        "warmup_num_steps": ("optim.warmup_steps", optim.warmup_steps),
        "warmup_max_lr": ("optim.lr", optim.lr),
        "warmup_min_lr": ("the warm-up's start", 0),
        "warmup_min_ratio": ("the warm-up's start", 0),
        "warmup_type": ("the warm-up", "linear"),
        "total_num_steps": ("train.steps", config.known_steps),
        "cos_min_ratio": ("optim.min_lr_ratio", optim.min_lr_ratio),
        "last_batch_iteration": ("the first step", -1),
    }
    later = set() if config.known_steps else {"total_num_steps"}  # once train.epochs is counted
    known = {name: of for name, of in known.items() if name not in later}
    differs = kind != AUTO and _SCHEDULES.get(str(kind).lower()) != optim.schedule
    # a section with "auto" is there to be filled in: of its type the Trainer's users say nothing
    if differs and AUTO not in params.values():
        must_agree(file.name, "scheduler.type", kind, "optim.schedule", optim.schedule)
    _check_params(file, "scheduler", params, known, later)
    return [
        f"{file.name}: scheduler: the recipe's is taken: optim.schedule={optim.schedule}, "
        f"optim.warmup_steps={optim.warmup_steps}"
    ]


def _section_and_params(
    file: DeepSpeedFile, name: str
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    section = file.options.get(name, AUTO)
    if section == AUTO:
        return None, {}
    params = section.get("params", {})
    params = {} if params == AUTO else params
    if not isinstance(params, dict):
        raise ConfigError(f"{file.name}: {name}.params must be an object, got {params!r:.40}")
    return section, params


def _check_params(
    file: DeepSpeedFile,
    section: str,
    params: dict[str, Any],
    known: dict[str, tuple[str, Any]],
    other: set[str],
) -> None:
    for name, stated in params.items():
        if name in known:
            must_agree(file.name, f"{section}.params.{name}", stated, *known[name])
        elif name not in other:
            near = difflib.get_close_matches(name, [*known, *other], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(
                f"{file.name}: {section}.params.{name}: the recipe sets the {section}; "
                f"remove it{hint}"
            )


def _equal(stated: Any, value: Any) -> bool:
    if isinstance(value, bool) or isinstance(stated, bool):
        return stated is value
    if isinstance(value, list):
        return (
            isinstance(stated, list)
            and len(stated) == len(value)
            and all(s == AUTO or _equal(s, v) for s, v in zip(stated, value, strict=True))
        )
    if is_number(value):
        return is_number(stated) and float(stated) == float(value)
    return str(stated).lower() == str(value).lower()


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
