"""What is measured for a release, in this order, and what each part wants of the machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Stage:
    """One command.

    minutes: on two cores, about. makes: the files and folders of results/ that it writes.
    wants: names of `WANTED`; where one is lacking the stage is left out.
    anew: what the command would go on from, removed when a stage begins on a source.
    """

    name: str
    command: str
    minutes: int
    makes: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    anew: tuple[str, ...] = ()

    @property
    def seconds(self) -> int:
        return 60 * self.minutes


# What a machine may lack: how to see it, and the way to it.
WANTED: Mapping[str, tuple[Callable[[], bool], str]] = {
    "root": (lambda: os.geteuid() == 0, "run as root"),
    "cluster": (lambda: shutil.which("slurmctld") is not None, "make cluster-tools"),
    "eval-env": (lambda: _can_import("lm_eval"), "make eval-env"),
    "serve-env": (Path(".venv-serve/bin/python").exists, "make serve-env"),
    "trial": (Path("runs/trial/pretrain/hf").exists, "make trial"),
    "peers": (lambda: _can_import("torchtitan"), "docs/performance.md says how"),
    "a GPU": (torch.cuda.is_available, "on a machine that has one"),
}

_GEMOE = "runs/demo/compare/annealed_seed_1/mixed/gemoe_seed_0 --data runs/demo/data/validation"
_TRIALS = "experiments/grids/contest_trials.json"
_NF4 = (
    "--again --ranks 1 --steps 1 --quantise nf4 --no-answers "
    "--set model.activation_checkpointing=true train.micro_batch_size=1 --out results/full_size_"
)

STAGES = (
    Stage("test", "make test", 12, wants=("eval-env",)),
    Stage(
        "demo",
        "python -m experiments.demo --report results/demo",
        12,
        ("demo",),
        anew=("runs/demo",),
    ),
    Stage(
        "k-flips",
        "gemoe evaluate runs/demo/gemoe/config.yaml model.dtype=bfloat16 --trained runs/demo/gemoe "
        "--data runs/demo/data/validation --out results/k_flips --flips",
        2,
        ("k_flips/k_flips.json",),
    ),
    Stage("trials", "make compare-trials", 180, anew=(_TRIALS, "runs/demo/compare")),
    Stage("compare", "make compare", 480, ("compare",), anew=("results/compare",)),
    Stage(
        "few-bits",
        f"python -m experiments.few_bits {_GEMOE}",
        10,
        ("few_bits.json",),
        anew=("runs/few_bits",),
    ),
    Stage("wheels", "python -m experiments.wheels", 8, ("wheels.json",), ("trial",)),
    Stage("parity", "make parity", 20, ("parity.json",)),
    Stage("resume", "make resume", 65, ("resume.json",)),
    Stage("faults", "make faults", 20, ("faults.json",), ("root", "cluster")),
    Stage("test-cluster", "make test-cluster", 30, wants=("root", "cluster")),
    Stage("test-slow", "make test-slow", 60, wants=("eval-env",)),
    Stage(
        "full-size",
        "python -m experiments.full_size --again --backbones olmoe deepseek_vl2",
        20,
        ("full_size.json",),
    ),
    Stage("estimates", "python -m experiments.estimates", 2, ("estimates.json",)),
    Stage(
        "full-size-molmoe-nf4",
        f"python -m experiments.full_size --backbones molmoe {_NF4}molmoe_nf4.json",
        10,
        ("full_size_molmoe_nf4.json",),
    ),
    Stage(
        "full-size-qwen3-vl-nf4",
        f"python -m experiments.full_size --backbones qwen3_vl_moe {_NF4}qwen3_vl_nf4.json",
        20,
        ("full_size_qwen3_vl_nf4.json",),
    ),
    Stage("bench", "make bench", 45, ("bench_cpu.json", "bench_cpu.md"), ("root",)),
    Stage(
        "bench-layer",
        "python -m benchmarks --suites layer --mean-ks 5.1 8 --modes forward frozen "
        "--out results/bench_layer.json",
        10,
        ("bench_layer.json", "bench_layer.md"),
        ("peers",),
    ),
    Stage(
        "bench-quantised",
        "python -m benchmarks --suites quantised --out results/bench_quantised.json",
        5,
        ("bench_quantised.json", "bench_quantised.md"),
    ),
    Stage("generation", "python -m benchmarks.generation", 20, ("generation_cpu.json",)),
    Stage("scale", "make scale", 40, ("scale.json", "scale.md")),
    Stage("data-bench", "make data-bench", 30, ("data_cpu.json",)),
    Stage("serve-test", "make serve-test", 30, wants=("serve-env",)),
    Stage(
        "serving",
        "python -m benchmarks.serving --out results/serving_cpu.json",
        25,
        ("serving_cpu.json",),
        ("serve-env",),
    ),
    Stage("answers", "python -m benchmarks.answers", 15, ("answers_cpu.json",), ("eval-env",)),
    Stage("gpu-check", "make gpu-check", 10, ("gpu_check.json", "gpu_check.md"), ("a GPU",)),
)


def lacking(stage: Stage) -> list[str]:
    """What this machine lacks for a stage, each with the way to it."""
    return [f"{name} ({WANTED[name][1]})" for name in stage.wants if not WANTED[name][0]()]


def stage_of(file: str) -> Stage | None:
    """The stage that makes a file of results/, or makes the folder that it is in."""
    for stage in STAGES:
        if any(file == made or file.startswith(f"{made}/") for made in stage.makes):
            return stage
    return None


def _can_import(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
