"""The command line of `gemoe train`: a recipe, overrides, and a few flags."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gemoe_ds.config.choices import Choice
from gemoe_ds.config.load import load_config, parse_yaml
from gemoe_ds.config.paths import shipped
from gemoe_ds.config.schema import RunConfig
from gemoe_ds.errors import ConfigError
from gemoe_ds.parser import Parser, at_least_one, positive_number


@dataclass(frozen=True)
class Flags:
    """What the command line asks for beside the run itself."""

    dry_run: bool
    print_config: bool
    estimate: int | None = None
    gpu_memory: float | None = None  # GiB


def parse_cli(argv: Sequence[str]) -> tuple[RunConfig, Flags]:
    """Parse the arguments after the program's name.

    Raises ConfigError (one line) for any mistake. `--help` prints every option and exits with 0.
    """
    arguments = _parser().parse_intermixed_args(_without_bare_deepspeed(argv))
    files = [f for f in (arguments.deepspeed, arguments.deepspeed_config) if f is not None]
    if len(set(files)) > 1:
        raise ConfigError(
            f"--deepspeed {files[0]} and --deepspeed_config {files[1]} name two files; give one"
        )
    resumes = list(dict.fromkeys(arguments.resume or []))
    if len(resumes) > 1:
        first = next((one for one in resumes if one not in ("none", "auto")), resumes[0])
        both = " and ".join(f"--resume {one}" for one in resumes)
        raise ConfigError(f"{both} contradict each other; {_one_of('resume', first)}")
    flags = {"deepspeed": files[0] if files else None, "resume": next(iter(resumes), None)}
    config = load_config(arguments.recipe, with_flags(arguments.overrides, flags))
    return config, Flags(
        arguments.dry_run,
        arguments.print_config,
        arguments.estimate,
        arguments.gpu_memory,
    )


def with_flags(overrides: Sequence[str], flags: Mapping[str, str | None]) -> list[str]:
    """The overrides, and behind them those that flags mean; None: the flag was not given.

    Raises ConfigError for an override that says something else than the flag of its name.
    """
    found = list(overrides)
    for key, value in flags.items():
        if value is None:
            continue
        for override in overrides:
            name, _, text = override.partition("=")
            if name == key and parse_yaml(text, override) != value:
                raise ConfigError(f"--{key} {value} contradicts {override}; {_one_of(key, text)}")
        found.append(f"{key}={json.dumps(value)}")  # quoted: a path is never another YAML type
    return found


def _one_of(key: str, text: str) -> str:
    """The way out for an option that is given twice."""
    if key != "resume" or text in ("none", "auto"):
        return "give one of them"
    return (
        f"give one of them, or start_from={text}, which --resume auto (as SLURM jobs have it) "
        "begins with where output_dir has no checkpoint"
    )


def _without_bare_deepspeed(argv: Sequence[str]) -> list[str]:
    """Without the `--deepspeed` that names no file, as scripts with DeepSpeed's own flags have it.

    They say `--deepspeed --deepspeed_config FILE`: train with it. Nothing trains without it here.
    """
    kept = []
    for word, following in zip(argv, [*argv, "-"][1:], strict=True):
        is_override = following.partition("=")[0].partition(".")[0] in RunConfig.model_fields
        is_recipe = following.endswith((".yaml", ".yml")) or following in shipped("recipes")
        if word != "--deepspeed" or not (
            following.startswith("-") or is_recipe or ("=" in following and is_override)
        ):
            kept.append(word)
    return kept


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Train; `python`, `torchrun` and `deepspeed` start the same run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(_option_lines()),
    )
    parser.add_argument(
        "recipe", help="a YAML file, or the name of one that ships, such as olmoe_gemoe_8_gpus"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="change an option of the recipe"
    )
    parser.add_argument("--deepspeed", metavar="FILE", help="same as deepspeed=FILE")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="same as --deepspeed FILE")
    parser.add_argument(
        "--resume", action="append", metavar="auto|none|DIR", help="same as resume=..."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, take one step, write nothing"
    )
    parser.add_argument(
        "--estimate",
        type=at_least_one,
        metavar="RANKS",
        help="print the memory that each of this many GPUs would need, and every way to lay the "
        "run on them, then stop",
    )
    parser.add_argument(
        "--gpu-memory",
        type=positive_number,
        metavar="GIB",
        help="of a GPU, for --estimate; without it that of the present one, else 80",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved recipe, then stop"
    )
    # The deepspeed launcher adds it; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def _option_lines() -> Iterator[str]:
    """The epilog of --help, made from the models themselves."""
    yield "options of a recipe (YAML, or key.path=value here):"
    yield from _lines_of(RunConfig, "")
    for choice in (c for c in _models_in(RunConfig) if issubclass(c, Choice)):
        path = "model." + choice.family.__name__.lower()
        for name in choice.family.names():
            yield f"options of {path}.name={name}:"
            yield from _lines_of(choice.family.named(name).Config, f"{path}.")


def _lines_of(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, field in model.model_fields.items():
        inner = field.annotation
        if (
            isinstance(inner, type)
            and issubclass(inner, BaseModel)
            and not issubclass(inner, Choice)
        ):
            yield from _lines_of(inner, f"{prefix}{key}.")
        else:
            yield f"  {prefix}{key:<{34 - len(prefix)}} {_describe(field)}"
            for section in get_args(inner):  # that may be null
                if isinstance(section, type) and issubclass(section, BaseModel):
                    yield from _lines_of(section, f"{prefix}{key}.")


def _models_in(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield field.annotation
            yield from _models_in(field.annotation)


def _describe(field: FieldInfo) -> str:
    required = field.default is PydanticUndefined
    default = "required" if required else f"default {json.dumps(field.default)}"
    parts = [_type_name(field.annotation), default, field.description or ""]
    return "; ".join(part for part in parts if part)


def _type_name(annotation: Any) -> str:
    """The type as a user writes the value: `float | null`, `routers | all`, `[float, float]`."""
    if isinstance(annotation, type) and issubclass(annotation, Choice):
        return "{name: " + " | ".join(annotation.family.names()) + ", ...}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    if annotation is NoneType:
        return "null"
    arguments = get_args(annotation)
    if not arguments:
        if annotation is Ellipsis:  # tuple[X, ...]
            return "..."
        return annotation if isinstance(annotation, str) else str(annotation.__name__)
    if get_origin(annotation) is Annotated:
        return _type_name(arguments[0])
    if get_origin(annotation) is tuple:
        return f"[{', '.join(map(_type_name, arguments))}]"
    return " | ".join(map(_type_name, arguments))
