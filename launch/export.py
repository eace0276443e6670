"""Write a trained run as a Hugging Face folder.

    launch/export.py RUN/config.yaml --trained RUN --out FOLDER

Stock transformers loads it as the backbone with its fixed k; with `trust_remote_code=True` it
routes as it did in training, without gemoe_ds and without DeepSpeed (docs/export.md).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, uninstalled

from gemoe_ds.errors import CheckpointError, ConfigError, exit_on_error


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="of the run: its output_dir/config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--trained", type=Path, required=True, help="the run's folder (newest checkpoint) or a step"
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    arguments = parser.parse_args(argv)
    with exit_on_error():
        if arguments.out.exists():
            raise ConfigError(f"--out {arguments.out} exists; choose a new folder or remove it")
        _export(arguments)


def _export(arguments: argparse.Namespace) -> None:
    from gemoe_ds.backbones.model import ExpertShard
    from gemoe_ds.config import load_config
    from gemoe_ds.engine import manifest
    from gemoe_ds.engine.checkpoint import put_trained
    from gemoe_ds.engine.pieces import stacked
    from gemoe_ds.export.folder import export
    from gemoe_ds.train.assemble import build_model

    config = load_config(arguments.recipe, [*arguments.overrides, "model.dtype=float32"])
    given = arguments.trained
    step = given if (given / manifest.MANIFEST).exists() else manifest.newest(given)
    found = manifest.verify(step)
    base = Path(config.model.checkpoint) if config.model.checkpoint else None
    stored = found.manifest["identity"].get("base checkpoint")
    actual = manifest.checksum_folder(base)
    if stored != actual:
        raise CheckpointError(
            f"{step} was trained on a base with checksum {stored}, model.checkpoint={base} has "
            f"{actual}; give the base of that run"
        )
    model = build_model(config, ExpertShard())
    put_trained(model, step)
    export(
        model,
        stacked(found.tensors(manifest.WEIGHTS)),
        base=base,
        tokenizer=Path(config.data.tokenizer),
        router=config.model.router.flat(),
        provenance={
            "command": shlex.join(["launch/export.py", *sys.argv[1:]]),
            "checkpoint": str(step),
            "step": found.step,
            "base": str(base),
            "base sha256": actual,
        },
        out=arguments.out,
    )
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
