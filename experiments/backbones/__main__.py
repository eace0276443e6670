"""Make the demo's pretrained models again, into OUT (a new folder); half an hour on 2 CPU cores.

Every step is one command that can be typed by hand; `--list` prints them all. Weights are stored
in bfloat16. SHA256SUMS has the checksums of all files, for `sha256sum --check`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from experiments import CHECKOUT, RECIPES
from experiments.demo import DEMO, data_steps, python_step, train_step
from experiments.steps import Step, list_or_run
from gemoe_ds.files import whole_folder
from gemoe_ds.parser import Parser

RUNS = Path("runs/backbones")
SOURCES = {  # folder that ships: the run that makes it
    "annealed": "anneal_0",
    "annealed_seed_1": "anneal_1",
    "plain": "pretrain_0",
}


def backbone_steps(out: Path) -> list[Step]:
    """Data, tokenizer, and for every seed a vision tower, pretraining and annealing."""
    data, tokenizer = DEMO / "data/train", RUNS / "tokenizer"
    train_tokenizer = f"data_prep/train_tokenizer.py --data {data} --out {tokenizer}"
    steps = data_steps(("train", "validation"))
    steps.append(
        python_step("tokenizer", train_tokenizer, tokenizer, seconds=5, needs=("convert_train",))
    )
    for seed in (0, 1):
        tower = RUNS / f"vision_{seed}"
        shared = [f"data.tokenizer={tokenizer}", f"model.backbone.vision_checkpoint={tower}"]
        steps.append(
            python_step(
                f"vision_{seed}",
                f"-m experiments.pretrain_vision {RECIPES}/demo_pretrain.yaml seed={seed} "
                f"data.tokenizer={tokenizer} --out {tower}",
                tower,
                seconds=35,
                needs=("tokenizer",),
            )
        )
        pretrain, anneal = RUNS / f"pretrain_{seed}", RUNS / f"anneal_{seed}"
        needs = ("convert_validation", f"vision_{seed}")
        steps.append(
            train_step(
                pretrain.name,
                "demo_pretrain",
                2,
                pretrain,
                370,
                needs=needs,
                seed=seed,
                overrides=shared,
            )
        )
        steps.append(
            train_step(
                anneal.name,
                "demo_anneal",
                2,
                anneal,
                105,
                needs=(pretrain.name,),
                seed=seed,
                overrides=[*shared, f"model.checkpoint={pretrain}/hf"],
            )
        )
    store = f"-m experiments.backbones --store --out {out}"
    steps.append(python_step("store", store, out, seconds=5, needs=tuple(s.name for s in steps)))
    return steps


def store(out: Path) -> None:
    """The folders that ship, out of the runs."""
    with whole_folder(out) as folder:
        shutil.copytree(RUNS / "tokenizer", folder / "tokenizer")
        for name, run in SOURCES.items():
            store_rounded(RUNS / run / "hf", folder / name)
        write_checksums(folder)
    print(f"saved {out}")


def store_rounded(source: Path, out: Path) -> None:
    """The same folder, its weights in bfloat16."""
    out.mkdir()
    weights = load_file(source / "model.safetensors")
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file(rounded, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(source / "generation_config.json", out)


def write_checksums(folder: Path) -> None:
    """SHA256SUMS of every file below."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n"
        for path in files
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def main() -> int:
    parser = Parser("python -m experiments.backbones", description=__doc__)
    parser.add_argument("--out", type=Path, default=RUNS / "stored", help="folder to write")
    parser.add_argument("--store", action="store_true", help="only the last step")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    arguments = parser.parse_or_exit()
    os.chdir(CHECKOUT)
    if arguments.store:
        store(arguments.out)
        return 0
    steps = backbone_steps(arguments.out)
    return list_or_run(steps, RUNS / "steps", list_only=arguments.list, report=None)


if __name__ == "__main__":
    sys.exit(main())
