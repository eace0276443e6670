"""Write a trained run as a Hugging Face folder.

    gemoe export RUN/config.yaml --trained RUN --out FOLDER

transformers with `trust_remote_code=True` routes as in training, without gemoe_ds and DeepSpeed.
Anything that runs the base model runs the folder, with the base model's fixed k (docs/export.md).

    gemoe export RECIPE --quantise nf4 --out FOLDER

writes the base itself with experts in 4 bits, to train on with less memory (docs/few_bits.md).
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gemoe_ds.errors import CheckpointError, ConfigError, exit_on_error
from gemoe_ds.parser import Parser

if TYPE_CHECKING:
    from gemoe_ds.config import RunConfig
    from gemoe_ds.models.shard import ExpertShard


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="recipe of the run: its output_dir/config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--trained",
        type=Path,
        help="run folder (newest checkpoint) or one step-* folder; with --quantise it may be left "
        "out",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--code",
        choices=("own", "base"),
        help="own (default): transformers finds the code of the trained routing, with "
        "trust_remote_code; base: the code that the base names, if any, stays in place (fixed k)",
    )
    parser.add_argument(
        "--quantise",
        choices=("float8", "int8", "nf4"),
        help="experts in 8 or 4 bits, and linear maps in 8; float8: as Qwen and DeepSeek publish "
        "it, for transformers and vLLM too; int8 and nf4: for gemoe_ds alone (docs/few_bits.md)",
    )
    parser.add_argument(
        "--base",
        type=Path,
        help="another folder of the same model, to write the trained weights onto: the one before "
        "it was quantised, say (default: model.checkpoint)",
    )
    arguments = parser.parse_or_exit(argv)
    with exit_on_error():
        _export(arguments)


def _export(arguments: argparse.Namespace) -> None:
    if arguments.trained is not None:
        _export_trained(arguments)
    elif arguments.quantise is not None:
        for name in ("code", "base"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name} is for what has trained; give --trained, or leave it")
        _quantise_base(arguments)
    else:
        raise ConfigError(
            "--trained is missing: the run to export; without one --quantise writes the base"
        )


def _export_trained(arguments: argparse.Namespace) -> None:
    from gemoe_ds.checkpoint import manifest
    from gemoe_ds.checkpoint.state import load_trained, load_trained_weights
    from gemoe_ds.config import load_config
    from gemoe_ds.export.folder import export
    from gemoe_ds.export.other_base import check_other_base
    from gemoe_ds.files import check_new
    from gemoe_ds.hf_io.hf_config import quantisation_of, read_config
    from gemoe_ds.train.assemble import build_model

    check_new(arguments.out)
    config = load_config(arguments.recipe, arguments.overrides)
    config.check_paths("model.", "data.tokenizer")
    step = manifest.newest(arguments.trained)
    found = manifest.read(step)
    base = Path(config.model.checkpoint) if config.model.checkpoint else None
    onto = arguments.base or base
    if arguments.base and not base:
        raise ConfigError("--base is another folder of model.checkpoint, which is null")
    own_code = arguments.code != "base"
    if own_code and (arguments.quantise or (onto and quantisation_of(read_config(onto)))):
        what, way_out = f"{onto} is quantised", "--base the folder before it was quantised"
        if arguments.quantise:
            what, way_out = f"--quantise {arguments.quantise}", "leave out --quantise"
        raise ConfigError(
            f"{what}, and the code that goes with an export computes with whole weights; give "
            f"--code base, for who reads such folders, or {way_out}"
        )
    if arguments.base and base:
        check_other_base(arguments.base, base)
    stored = found.manifest["identity"].get("base checkpoint")
    actual = manifest.checksum_folder(base)
    if stored != actual:
        raise CheckpointError(
            f"{step} was trained on a base with checksum {stored}, model.checkpoint={base} has "
            f"{actual}; give the base of that run"
        )
    model = build_model(config, _fewest_experts(config))
    load_trained_weights(model, step)
    export(
        model,
        load_trained(step),
        base=onto,
        tokenizer=Path(config.data.tokenizer),
        router=config.model.router.flat(),
        provenance={
            "command": shlex.join(["gemoe", "export", *sys.argv[1:]]),
            "checkpoint": str(step),
            "step": found.step,
            "base": str(onto),
            "base sha256": manifest.checksum_folder(onto) if arguments.base else actual,
        }
        | ({"trained on": str(base), "trained on sha256": actual} if arguments.base else {}),
        out=arguments.out,
        own_code=own_code,
        format_of=_format_of(config, arguments.quantise) if arguments.quantise else None,
    )
    print(f"wrote {arguments.out}")


def _quantise_base(arguments: argparse.Namespace) -> None:
    from gemoe_ds.config import load_config
    from gemoe_ds.files import check_new, whole_folder
    from gemoe_ds.hf_io.rewriter import DISK_ERRORS
    from gemoe_ds.models.few_bits import format_of
    from gemoe_ds.train.assemble import named_backbone

    check_new(arguments.out)
    config = load_config(arguments.recipe, arguments.overrides)
    config.check_paths("model.", "data.tokenizer")
    base = _base(config)
    backbone = named_backbone(config)
    hf = backbone.load(base, Path(config.data.tokenizer))
    formats = format_of(backbone, hf, arguments.quantise)
    with whole_folder(arguments.out, DISK_ERRORS) as folder:
        backbone.save_quantised(hf, {}, base, folder, formats)
    print(f"wrote {arguments.out}")


def _format_of(config: RunConfig, of_experts: str) -> dict[str, str]:
    from gemoe_ds.models.few_bits import format_of
    from gemoe_ds.train.assemble import named_backbone

    backbone = named_backbone(config)
    model = backbone.load(_base(config), Path(config.data.tokenizer))
    return format_of(backbone, model, of_experts)


def _base(config: RunConfig) -> Path:
    if config.model.checkpoint is None:
        raise ConfigError("model.checkpoint=null: --quantise writes a folder from that of a base")
    return Path(config.model.checkpoint)


def _fewest_experts(config: RunConfig) -> ExpertShard:
    """The folder is written from the base's files: of the experts the model needs no more."""
    from gemoe_ds.models.shard import ExpertShard
    from gemoe_ds.train.assemble import named_backbone

    backbone = named_backbone(config)
    checkpoint = Path(config.model.checkpoint) if config.model.checkpoint else None
    blocks = backbone.moe_blocks(backbone.load(checkpoint, Path(config.data.tokenizer)))
    return ExpertShard(num_ranks=math.gcd(*(block.routing.num_experts for block in blocks)))


if __name__ == "__main__":
    main()
