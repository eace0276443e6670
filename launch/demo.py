"""The main job in small, step by step: data, pretraining, GeMoE and its baselines, the report.

Every step is one command that can be typed by hand; `--list` prints them all. A finished step is
skipped when this runs again, an interrupted training step continues from its newest checkpoint,
and a step whose command, recipe or input changed starts anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, uninstalled

from gemoe_ds.config.load import read_recipe

DEMO = Path("runs/demo")
RECIPES = Path("launch/recipes")
STATIC_K = (8, 7, 6, 5, 4, 3, 2)
TUNED_K = (8, 5)


@dataclass(frozen=True)
class Step:
    """One command. `seconds` is what it takes on 2 CPU cores, for the estimate of what is left."""

    name: str
    command: tuple[str, ...]
    output: Path  # what it makes; removed before the step starts anew
    seconds: int
    needs: tuple[str, ...] = ()  # steps whose outcome it reads
    recipe: Path | None = None
    resumable: bool = False  # continues by itself from what an interrupted try has left


def demo_steps(seeds: Sequence[int], num_ranks: int, report: Path) -> list[Step]:
    """The whole demo. With one rank, twice the accumulation gives the same global batches."""
    steps = [
        _python(
            "scenes",
            f"data_prep/make_scenes.py --out {DEMO}/scenes --seed 0",
            DEMO / "scenes",
            seconds=15,
        )
    ]
    for split in ("train", "validation", "test"):
        scenes, data = DEMO / "scenes", DEMO / "data" / split
        steps.append(
            _python(
                f"convert_{split}",
                f"data_prep/convert_llava.py --json {scenes}/{split}.json "
                f"--kinds {scenes}/{split}_kinds.json --images {scenes}/images --out {data}",
                data,
                seconds=4,
                needs=("scenes",),
            )
        )
    steps.append(
        _python(
            "tokenizer",
            f"data_prep/train_tokenizer.py --data {DEMO}/data/train --out {DEMO}/tokenizer",
            DEMO / "tokenizer",
            seconds=5,
            needs=("convert_train",),
        )
    )
    vision = f"launch/pretrain_vision.py {RECIPES}/demo_pretrain.yaml --out {DEMO}/vision"
    steps.append(_python("vision", vision, DEMO / "vision", seconds=35, needs=("tokenizer",)))
    prepared = ("convert_validation", "convert_test", "vision")
    steps.append(
        _train("pretrain", "demo_pretrain", num_ranks, DEMO / "pretrain", 370, needs=prepared)
    )
    steps.append(
        _train("anneal", "demo_anneal", num_ranks, DEMO / "anneal", 105, needs=("pretrain",))
    )
    tuned = [(f"top_{k}", f"demo_top_{k}", 0) for k in TUNED_K]
    tuned += [("gemoe" if s == 0 else f"gemoe_seed_{s}", "demo_gemoe", s) for s in seeds]
    for name, recipe, seed in tuned:
        steps.append(_train(name, recipe, num_ranks, DEMO / name, 65, needs=("anneal",), seed=seed))
    static = f"{RECIPES}/demo_top_8.yaml --k {' '.join(map(str, STATIC_K))}"
    evaluations = [("static", static, "anneal")]
    evaluations += [
        (name, f"{DEMO}/{name}/config.yaml --trained {DEMO}/{name}", name) for name, _, _ in tuned
    ]
    for name, arguments, trained_by in evaluations:
        folder = DEMO / "eval" / name
        options = f"{arguments} --data {DEMO}/data/test --out {folder}"
        command = ("deepspeed", "--num_gpus", str(num_ranks), "launch/evaluate.py")
        steps.append(
            Step(
                f"evaluate_{name}",
                (*command, *shlex.split(options)),
                folder,
                seconds=25 if name == "static" else 15,
                needs=(trained_by,),
            )
        )
    folders = [f"{DEMO}/eval/static/k_{k}" for k in STATIC_K]
    folders += [f"{DEMO}/eval/{name}" for name, _, _ in tuned]
    made_by = "make demo" if report == DEMO else "make demo-seeds"
    steps.append(
        _python(
            "report",
            f"launch/analyze.py {' '.join(folders)} --out {report} "
            f"--tensorboard {DEMO}/figures_board --command '{made_by}'",
            report / "report.md",
            seconds=15,
            needs=tuple(f"evaluate_{name}" for name, _, _ in evaluations),
        )
    )
    return steps


def _python(
    name: str, arguments: str, output: Path, *, seconds: int, needs: tuple[str, ...] = ()
) -> Step:
    return Step(name, ("python", *shlex.split(arguments)), output, seconds, needs)


def _train(
    name: str,
    recipe: str,
    num_ranks: int,
    output: Path,
    seconds: int,
    *,
    needs: tuple[str, ...],
    seed: int = 0,
) -> Step:
    path = RECIPES / f"{recipe}.yaml"
    command = ["deepspeed", "--num_gpus", str(num_ranks), "launch/train.py", str(path)]
    if seed:
        command += [f"seed={seed}", f"output_dir={output}"]
    if num_ranks == 1:
        command += ["parallel.ep_size=1", "train.accumulation=2"]
    command += ["--resume", "auto"]
    return Step(name, tuple(command), output, seconds, needs, path, resumable=True)


class Progress:
    """What has been done, in `folder`: one small JSON a step, replaced atomically."""

    def __init__(self, folder: Path, steps: Sequence[Step]) -> None:
        self.folder = folder
        self.fingerprints: dict[str, str] = {}
        for step in steps:  # a step comes after those that it needs
            parts = [*step.command, *(self.fingerprints[name] for name in step.needs)]
            if step.recipe:
                parts.append(json.dumps(read_recipe(step.recipe), sort_keys=True))
            self.fingerprints[step.name] = hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def is_done(self, step: Step) -> bool:
        return self._state(step) == "done" and step.output.exists()

    def begin(self, step: Step) -> None:
        """Note the start; what an older try has left stays only if the step can continue it."""
        if not (step.resumable and self._state(step) in ("started", "done")):
            _remove(step.output)
        self._write(step, "started")

    def finish(self, step: Step) -> None:
        self._write(step, "done")

    def _state(self, step: Step) -> str | None:
        """The state that was written for this very command and these inputs."""
        try:
            written = json.loads((self.folder / f"{step.name}.json").read_text())
        except (OSError, ValueError):
            return None
        same = written.get("fingerprint") == self.fingerprints[step.name]
        return str(written.get("state")) if same else None

    def _write(self, step: Step, state: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{step.name}.json"
        fresh = path.with_suffix(".tmp")
        record = {"state": state, "fingerprint": self.fingerprints[step.name]}
        fresh.write_text(json.dumps(record | {"command": shlex.join(step.command)}))
        os.replace(fresh, path)


def run_steps(steps: Sequence[Step], progress: Progress) -> int:
    """Run what is not done yet, in order; the exit code of the first step that fails, or 0."""
    begun = time.monotonic()
    todo = [step for step in steps if not progress.is_done(step)]
    if len(todo) < len(steps):
        print(f"== {len(steps) - len(todo)} of {len(steps)} steps are done already", flush=True)
    for number, step in enumerate(todo, 1):
        left = sum(later.seconds for later in todo[number - 1 :])
        print(
            f"\n== step {number} of {len(todo)}: {step.name} "
            f"({_clock(time.monotonic() - begun)} so far, about {_clock(left)} left on 2 CPU cores)"
            f"\n$ {shlex.join(step.command)}",
            flush=True,
        )
        progress.begin(step)
        try:
            code = subprocess.run(step.command, env=_environment(step)).returncode
        except KeyboardInterrupt:
            print("\n== interrupted; run the same command to continue from here", flush=True)
            return 130
        if code != 0:
            print(
                f"== step {step.name} failed (exit code {code}); finished steps are kept, "
                "run the same command to continue from here",
                file=sys.stderr,
                flush=True,
            )
            return code
        progress.finish(step)
    print(f"\n== all done in {_clock(time.monotonic() - begun)}", flush=True)
    return 0


def _environment(step: Step) -> dict[str, str]:
    """This interpreter's programs first on the path; threads that do not fight over the cores."""
    cores = os.cpu_count() or 1
    ranks = int(step.command[2]) if step.command[0] == "deepspeed" else 1
    defaults = {"OMP_NUM_THREADS": str(max(1, min(4, cores // ranks)))}
    if not torch.cuda.is_available():
        defaults["DS_ACCELERATOR"] = "cpu"  # DeepSpeed finds out by itself, with many warnings
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return defaults | os.environ | {"PATH": programs}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="one GeMoE row each (default: 0)"
    )
    parser.add_argument(
        "--report", type=Path, default=DEMO, help=f"folder of the report (default: {DEMO})"
    )
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    arguments = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent.parent)
    # Two gloo ranks on a CPU machine; one rank where there is a single GPU.
    steps = demo_steps(arguments.seeds, min(torch.cuda.device_count() or 2, 2), arguments.report)
    if arguments.list:
        for step in steps:
            print(shlex.join(step.command))
        return 0
    code = run_steps(steps, Progress(DEMO / "steps", steps))
    if code == 0:
        print(f"   report      {arguments.report}/report.md")
        print(f"   figures     {arguments.report}/figures/")
        print(f"   TensorBoard .venv/bin/tensorboard --logdir {DEMO}")
    return code


if __name__ == "__main__":
    sys.exit(main())
