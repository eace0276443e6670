"""Whatever wants a GPU, in about ten minutes on one: results/gpu_check.json and .md.

Each goal stands beside its figure: the tests marked gpu, the layer against its peers, 50 training
steps and answers of a backbone at its true size, memory against the estimate, and, with
--checkpoint, a published folder beside its publishers' code. A part that fails says so, and the
others go on; the same command goes on from there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments import CHECKOUT, RECIPES
from experiments.steps import Progress, Step, environment
from gemoe_ds.analysis.tables import markdown
from gemoe_ds.errors import ConfigError, GemoeError, exit_on_error
from gemoe_ds.files import write_text
from gemoe_ds.parser import Parser

RUNS = Path("runs/gpu_check")
STEPS = 50
# A micro-batch that fills a GPU: 8 samples of some 2,000 tokens.
TRAINING = ("train.micro_batch_size=8", "monitor.every=10")
TURNS = 160
PAPER_K = 5.1  # mean k of GeMoE on the paper's backbones
# Dense bfloat16 FLOP/s, as their makers give them.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


@dataclass(frozen=True)
class Goal:
    """`is_met` None: there is no goal, or no figure."""

    name: str
    figure: str
    goal: str = "-"
    is_met: bool | None = None


def steps(backbone: str, checkpoint: Path | None) -> list[Step]:
    def step(name: str, seconds: int, *words: str) -> Step:
        return Step(name, ("python", "-m", *words), RUNS / f"{name}.json", seconds)

    folder = checkpoint or Path(f"runs/full_size/{backbone}/checkpoint")
    own = ["--checkpoint", str(folder)] if checkpoint else ["--keep"]
    full_size = ["--backbones", backbone, "--ranks", "1", "--steps", str(STEPS), "--again", *own]
    full_size += ["--turns", str(TURNS), "--set", *TRAINING, "--out", f"{RUNS}/training.json"]
    bench = ["--suites", "layer", "steps", "--tokens", "16384", "--rounds", "5"]
    found = [
        step("tests", 120, "pytest", "-m", "gpu", "-q", f"--junitxml={RUNS}/tests.json"),
        step("layer", 180, "benchmarks", *bench, "--out", f"{RUNS}/layer.json"),
        step("training", 240, "experiments.full_size", *full_size),
    ]
    if checkpoint:
        options = [f"{RECIPES}/full_size.yaml", f"model.backbone.name={backbone}"]
        options += [f"model.checkpoint={folder}", f"data.tokenizer={folder}"]
        options += ["--out", f"{RUNS}/stock.json"]
        found.append(step("stock", 60, "benchmarks.beside_stock", *options))
    return found


def run(todo: list[Step]) -> dict[str, str]:
    """All that is not done yet; of each that fails, the last line that it said."""
    progress, failed = Progress(RUNS / "steps", todo), {}
    for step in todo:
        if progress.is_done(step):
            continue
        print(f"== {step.name}: {' '.join(step.command)}", flush=True)
        progress.begin(step)
        words = [sys.executable, *step.command[1:]]
        done = subprocess.run(
            words,
            env=environment(step.command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(done.stdout, flush=True)
        if done.returncode == 0 or step.name == "tests":
            progress.finish(step)
        else:
            lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
            failed[step.name] = lines[-1]
    return failed


def goals(folder: Path, failed: dict[str, str], backbone: str) -> Iterator[Goal]:
    """Of whatever parts have left a file."""
    parts = {"tests": _tests, "layer": _layer, "stock": _stock}
    for name, read in parts.items():
        path = folder / f"{name}.json"
        if name in failed:
            yield Goal(name, f"failed: {failed[name]}", "runs", False)
        elif path.exists():
            yield from read(path.read_text(encoding="utf-8"))
    if "training" in failed:
        yield Goal("training", f"failed: {failed['training']}", "runs", False)
    elif (folder / "training.json").exists():
        report = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        yield from _training(report["backbones"][backbone])


def _tests(xml: str) -> Iterator[Goal]:
    counted = {name: sum(map(int, re.findall(rf'{name}="(\d+)"', xml))) for name in _COUNTS}
    bad = counted["failures"] + counted["errors"]
    ran = counted["tests"] - counted["skipped"]
    words = f"{ran - bad} of {ran} pass, {counted['skipped']} skipped"
    yield Goal("tests marked gpu", words, "all pass", bad == 0 and ran > 0)


_COUNTS = ("tests", "failures", "errors", "skipped")


def _layer(text: str) -> Iterator[Goal]:
    """Of 16,384 tokens: against the fastest peer at the same k, and what fewer experts save."""
    rows: list[dict[str, Any]] = [r for r in json.loads(text)["rows"] if r["suite"] == "layer"]
    for mode, most in (("forward", 0.95), ("frozen", 0.9)):
        of_mode = [row for row in rows if row["mode"] == mode and "ms" in row]
        top_k = max((row["mean_k"] for row in of_mode), default=0)
        ours = [r for r in of_mode if r["layer"] == "gemoe_ds"]
        full = next((r for r in ours if r["mean_k"] == top_k), None)
        layers = [r for r in of_mode if r["layer"] not in ("gemoe_ds", *_NO_LAYERS)]
        peers = [r for r in layers if abs(r["mean_k"] - top_k) < 0.01]
        if full and peers:
            fastest = min(peers, key=lambda row: float(row["ms"]))
            ratio = full["ms"] / fastest["ms"]
            words = f"{ratio:.2f} of the time of {fastest['layer']}"
            yield Goal(f"layer, {mode}, k {top_k:g}", words, f"at most {most}", ratio <= most)
        near = [r for r in ours if abs(r["mean_k"] - PAPER_K) < 0.1 and "realised_over_ideal" in r]
        for row in near:
            share = row["realised_over_ideal"]
            yield Goal(
                f"layer, {mode}, realised / ideal at k {row['mean_k']:g}",
                f"{share:.2f}",
                "at least 0.85",
                share >= 0.85,
            )


_NO_LAYERS = ("dense product", "router alone")


def _training(found: dict[str, Any]) -> Iterator[Goal]:
    last = found["last_step"]
    rate = last["throughput/tokens_per_second"]
    yield Goal("training, tokens a second", f"{rate:,.0f} at mean k {last['mean_k']:.2f}")
    own = max(found["generation"], key=lambda cost: float(cost["mean_k_prompts"]))
    peak = next((flops for name, flops in PEAK.items() if name in found.get("device", "")), None)
    if peak:
        # Frozen experts: a product forward, and one backward to the rows.
        share = 2e9 * own["gflops_per_prompt_token"] * rate / peak
        words = f"{share:.1%} of {peak / 1e12:.0f} TFLOP/s, counted at k {own['mean_k_prompts']:g}"
        yield Goal("training, FLOP/s", words)
    estimated = found["estimated_bytes_per_rank"]
    used = max(max(phase["device_bytes"]) for phase in found["phases"])
    if used:
        ratio = estimated / used
        words = f"{estimated / 2**30:.1f} GiB estimated, {used / 2**30:.1f} used"
        yield Goal("memory", words, "0.85 to 1.15 of what is used", 0.85 <= ratio <= 1.15)
    for cost in found["generation"]:
        words = f"{cost['written_tokens_per_s']:.1f} tokens a second"
        yield Goal(f"answers, {cost['mode']}", f"{words} at mean k {cost['mean_k_written']:.2f}")


def _stock(text: str) -> Iterator[Goal]:
    found = json.loads(text)
    if "not_compared" in found:
        yield Goal("beside the publishers' code", f"not compared: {found['not_compared']}")
        return
    mean = found["mean_difference"]
    words = f"{mean:.4f} on average, {found['largest_difference']:.3f} at most, {found['dtype']}"
    yield Goal("log-probabilities beside the publishers' code", words, "0.05", mean <= 0.05)
    same, of = found["greedy_tokens_equal"]
    yield Goal("greedy tokens beside the publishers' code", f"the first {same} of {of} are equal")


def page(found: list[Goal], where: dict[str, Any]) -> str:
    says = {True: "yes", False: "**no**", None: "-"}
    table = [["", "figure", "goal", "met"]]
    table += [[goal.name, goal.figure, goal.goal, says[goal.is_met]] for goal in found]
    origin = f"{where['machine']}; {where['date']}, commit `{where['commit']}`"
    return f"# On a GPU\n\n{origin}\n\n    {where['command']}\n\n{markdown(table)}\n"


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m experiments.gpu_check", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a published folder (else random weights)")
    parser.add_argument("--backbone", default="olmoe", help="its backbone's name (olmoe)")
    parser.add_argument("--out", type=Path, default=Path("results/gpu_check.json"))
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    arguments = parser.parse_or_exit(argv)
    checkpoint = arguments.checkpoint.absolute() if arguments.checkpoint else None
    os.chdir(CHECKOUT)
    from gemoe_ds.analysis.provenance import provenance

    todo = steps(arguments.backbone, checkpoint)
    if arguments.list:
        print("\n".join(" ".join(step.command) for step in todo))
        return 0
    with exit_on_error():
        _refuse(checkpoint, arguments.backbone)
        where, failed = provenance(), run(todo)
        found = list(goals(RUNS, failed, arguments.backbone))
        report = {"goals": [asdict(goal) for goal in found]} | where
        write_text(arguments.out, json.dumps(report, indent=1) + "\n")
        text = page(found, where)
        write_text(arguments.out.with_suffix(".md"), text)
        print(text, end="")
    return 1 if any(goal.is_met is False for goal in found) else 0


def _refuse(checkpoint: Path | None, backbone: str) -> None:
    """What would else show after minutes."""
    import torch

    from gemoe_ds.models.backbone import Backbone

    if not torch.cuda.is_available():
        raise ConfigError(
            "there is no CUDA device here, which is what this checks; `make test` is for CPUs"
        )
    if checkpoint and not (checkpoint / "config.json").is_file():
        raise ConfigError(f"--checkpoint {checkpoint}: no config.json there; give a model's folder")
    found, config = Backbone.configured(backbone, {})
    if checkpoint:
        try:
            found(config).load(checkpoint, checkpoint)
        except GemoeError as error:
            raise ConfigError(f"--backbone {backbone} does not fit --checkpoint: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
