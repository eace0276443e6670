"""The main job in small, step by step: data, GeMoE, our threshold, their baselines, the report.

The pretrained model ships: experiments/backbones, made by `python -m experiments.backbones`.

Every step is one command that can be typed by hand; `--list` prints them all. A finished step is
skipped when this runs again, an interrupted training step continues from its newest checkpoint,
and a step whose command, recipe or input changed starts anew.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments import CHECKOUT, RECIPES
from experiments.steps import Step, list_or_run
from gemoe_ds.parser import Parser

DEMO = Path("runs/demo")
STATIC_K = (8, 6, 5, 4, 3, 2)
BUDGETS = (5, 4, 3)
DATA = ("convert_train", "convert_validation", "convert_test")


def data_steps(
    splits: Sequence[str] = ("train", "validation", "test"),
    root: Path = DEMO,
    options: str = "--seed 0",
    seconds: int = 18,
) -> list[Step]:
    """Drawn scenes, by `options` of make_scenes.py, and what of them is asked for, converted.

    Every run of the demo and the contest is known by these commands too: another word in one of
    them, such as the SOURCE that --json is called now, and all of them are left to run.
    """
    scenes = root / "scenes"
    make = f"data_prep/make_scenes.py --out {scenes} {options}"
    steps = [python_step("scenes", make, scenes, seconds=seconds)]
    for split in splits:
        data = root / "data" / split
        steps.append(
            python_step(
                f"convert_{split}",
                f"data_prep/convert_llava.py --json {scenes}/{split}.json "
                f"--kinds {scenes}/{split}_kinds.json --images {scenes}/images --out {data}",
                data,
                seconds=4,
                needs=("scenes",),
            )
        )
    return steps


def static_step(num_ranks: int) -> Step:
    """The pretrained backbone as it is, with every static k."""
    return evaluate_step(
        "static",
        f"{RECIPES}/demo_top_8.yaml --k {' '.join(map(str, STATIC_K))}",
        DEMO / "eval/static",
        num_ranks,
        needs=DATA,
        seconds=40,
    )


STATIC_FOLDERS = [f"{DEMO}/eval/static/k_{k}" for k in STATIC_K]


def demo_steps(seeds: Sequence[int], num_ranks: int, report: Path) -> list[Step]:
    """The whole demo. With one rank, twice the accumulation gives the same global batches."""
    steps = data_steps()
    runs = [("top_8", "demo_top_8", 0)]
    for method in ("gemoe", "threshold"):
        runs += [(method if s == 0 else f"{method}_seed_{s}", f"demo_{method}", s) for s in seeds]
    for name, recipe, seed in runs:
        steps.append(train_step(name, recipe, num_ranks, DEMO / name, 65, needs=DATA, seed=seed))
    held = f"--mean-k {' '.join(map(str, BUDGETS))} --calibration-samples 256"
    rule = f"{RECIPES}/demo_top_8.yaml --router score {held}"
    evaluations = [
        static_step(num_ranks),
        evaluate_step("score", rule, DEMO / "eval/score", num_ranks, needs=DATA, seconds=35),
    ]
    folders = [*STATIC_FOLDERS, *(f"{DEMO}/eval/score/score_mean_k_{k}" for k in BUDGETS)]
    for name, recipe, _ in runs:
        folder, trained = DEMO / "eval" / name, f"{DEMO}/{name}/config.yaml --trained {DEMO}/{name}"
        if recipe == "demo_threshold":
            trained += f" {held}"
            folders += [f"{folder}/mean_k_{k}" for k in BUDGETS]
        else:
            folders.append(str(folder))
        evaluations.append(evaluate_step(name, trained, folder, num_ranks, needs=(name,)))
    steps += evaluations
    made_by = "make demo" if report == DEMO else "make demo-seeds"
    steps.append(
        python_step(
            "report",
            f"launch/analyze.py {' '.join(folders)} --out {report} "
            f"--tensorboard {DEMO}/figures_board --command '{made_by}'",
            report / "report.md",
            seconds=15,
            needs=tuple(step.name for step in evaluations),
        )
    )
    return steps


def python_step(
    name: str, arguments: str, output: Path, *, seconds: int, needs: tuple[str, ...] = ()
) -> Step:
    return Step(name, ("python", *shlex.split(arguments)), output, seconds, needs)


def evaluate_step(
    name: str,
    arguments: str,
    folder: Path,
    num_ranks: int,
    *,
    needs: tuple[str, ...],
    seconds: int = 15,
) -> Step:
    options = f"{arguments} --data {DEMO}/data/test --out {folder}"
    command = ("deepspeed", "--num_gpus", str(num_ranks), "launch/evaluate.py")
    return Step(
        f"evaluate_{name}", (*command, *shlex.split(options)), folder, seconds=seconds, needs=needs
    )


def train_step(
    name: str,
    recipe: str,
    num_ranks: int,
    output: Path,
    seconds: int,
    *,
    needs: tuple[str, ...],
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> Step:
    path = RECIPES / f"{recipe}.yaml"
    command = ["deepspeed", "--num_gpus", str(num_ranks), "launch/train.py", str(path)]
    if seed or overrides:
        command += [f"seed={seed}", f"output_dir={output}", *overrides]
    if num_ranks == 1:
        command += ["parallel.ep_size=1", "train.gradient_accumulation_steps=2"]
    command += ["--resume", "auto"]
    return Step(name, tuple(command), output, seconds, needs, path, resumable=True)


def main() -> int:
    parser = Parser("python -m experiments.demo", description=__doc__)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of what is trained (default: 0)"
    )
    parser.add_argument(
        "--report", type=Path, default=DEMO, help=f"folder of the report (default: {DEMO})"
    )
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    arguments = parser.parse_or_exit()
    os.chdir(CHECKOUT)
    # Two gloo ranks on a CPU machine; one rank where there is a single GPU.
    steps = demo_steps(arguments.seeds, min(torch.cuda.device_count() or 2, 2), arguments.report)
    code = list_or_run(steps, DEMO / "steps", list_only=arguments.list, report=arguments.report)
    if code == 0 and not arguments.list:
        print(f"   TensorBoard .venv/bin/tensorboard --logdir {DEMO}")
    return code


if __name__ == "__main__":
    sys.exit(main())
