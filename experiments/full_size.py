"""Backbones at their true sizes on this machine: results/full_size.json, or full_size_gpu.json.

For each: a checkpoint in its public layout with random weights (or --checkpoint, a real one),
loaded on --ranks ranks with expert parallelism among them; GeMoE is trained for --steps steps,
saved, resumed and trained for as many again; then answers are written at the backbone's own k and
at GeMoE's. Random weights say nothing of quality: what is measured is memory and time.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import CHECKOUT, RECIPES
from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.parser import Parser

SHARDS = 3
RECIPE = f"{RECIPES}/full_size.yaml"
SAMPLES = 400


def turns() -> Iterator[tuple[str, str]]:
    """A few hundred short conversations about numbers."""
    for n in range(SAMPLES):
        yield f"What comes after {n} ?", f"After {n} comes {n + 1} ."


def picture(number: int, size: tuple[int, int]) -> bytes:
    """Smooth colours of so many pixels; each number has its own."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stored = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(stored, "JPEG")
    return stored.getvalue()


def write_data(folder: Path, *, images: bool, num_turns: int) -> None:
    from gemoe_ds.data.sample import Turn, of_turns, write_samples

    every = [Turn(*turn) for turn in turns()] * 2
    samples = (
        of_turns(
            f"n{i}", picture(i, (480, 360)) if images else None, tuple(every[i : i + num_turns])
        )
        for i in range(SAMPLES)
    )
    write_samples(samples, folder, source="experiments/full_size.py")


def evict(folder: Path) -> None:
    """Forget what the system has cached of a folder's files."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def dd_rate(folder: Path) -> float:
    """Bytes a second of `dd` over the checkpoint's files, not cached."""
    evict(folder)
    files = sorted(folder.glob("*.safetensors"))
    began = time.perf_counter()
    for file in files:
        command = ["dd", f"if={file}", "of=/dev/null", "bs=16M", "status=none"]
        subprocess.run(command, check=True)
    return sum(file.stat().st_size for file in files) / (time.perf_counter() - began)


def kept_bytes(folder: Path, ranks: int) -> int:
    """What a rank keeps of the checkpoint: its share of the experts, everything else whole."""
    from gemoe_ds.hf_io.safetensors_reader import open_stored

    sizes = {key: tensor.num_bytes for key, tensor in open_stored(folder).items()}
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    return sum(sizes.values()) - experts + experts // ranks


class FullSize:
    """One backbone's folder, runs and figures."""

    def __init__(
        self,
        name: str,
        ranks: int,
        steps: int,
        real: Path | None = None,
        num_turns: int = 1,
        more: Sequence[str] = (),
        experts_dtype: str | None = None,
    ) -> None:
        self.name, self.ranks, self.steps, self.num_turns = name, ranks, steps, num_turns
        self.more, self.experts_dtype = more, experts_dtype
        self.root = Path("runs/full_size") / name
        self.base, self.data = real or self.root / "checkpoint", self.root / "data"
        self.tokenizer = real or self.root / "tokenizer"

    def prepare(self, *, again: bool = False) -> None:
        """What is missing; the run of an earlier try goes `again`, or ends this one."""
        from gemoe_ds.models.backbone import Backbone
        from gemoe_ds.models.random_checkpoint import (
            write_random_checkpoint,
            write_stand_in_tokenizer,
        )

        run = self.root / "run"
        if run.exists() and not again:
            raise ConfigError(f"{run} exists; remove it to measure again, or add --again")
        shutil.rmtree(run, ignore_errors=True)
        backbone = Backbone.named(self.name)
        if not (self.base / "config.json").is_file() and not self.in_few_bits.exists():
            float8 = self.experts_dtype is not None
            shards = 8 * SHARDS if float8 else SHARDS
            write_random_checkpoint(backbone, self.base, shards=shards, float8=float8)
        if not self.data.exists():
            sees = backbone(backbone.Config()).image_layout(backbone.published()) is not None
            write_data(self.data, images=sees, num_turns=self.num_turns)
        if self.tokenizer == self.base:
            return
        words = {word for turn in turns() for text in turn for word in text.split()}
        write_stand_in_tokenizer(backbone, words, self.tokenizer)

    @property
    def in_few_bits(self) -> Path:
        return self.root / str(self.experts_dtype)

    def quantise(self) -> float | None:
        """From now on the base is its twin in few bits; seconds to write that, if it was not."""
        began = time.perf_counter()
        is_there = self.in_few_bits.exists()
        if not is_there:
            command = [sys.executable, "-m", "gemoe_ds", "export", RECIPE, *self.options()]
            command += ["--quantise", str(self.experts_dtype), "--out", str(self.in_few_bits)]
            print(f"-- {shlex.join(command)}", flush=True)
            subprocess.run(command, check=True)
            shutil.rmtree(self.base)
        self.base = self.in_few_bits
        dense = "float8" if self.experts_dtype == "float8" else "int8"
        self.more = [
            f"model.experts_dtype={self.experts_dtype}",
            f"model.dense_dtype={dense}",
            *self.more,
        ]
        return None if is_there else time.perf_counter() - began

    def launched(self, script: str, *options: str) -> None:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={self.ranks}", f"launch/{script}", *options),
        ]
        print(f"-- {shlex.join(command)}", flush=True)
        subprocess.run(command, check=True)

    def options(self) -> list[str]:
        paths = {"model.checkpoint": self.base, "data.train_path": self.data}
        paths |= {"data.tokenizer": self.tokenizer, "output_dir": self.root / "run"}
        options = [f"{key}={path}" for key, path in paths.items()]
        return [*options, f"model.backbone.name={self.name}", f"parallel.ep_size={self.ranks}"]

    def estimated(self) -> int:
        """Bytes of a rank, of the device that is here."""
        import torch

        from gemoe_ds.config.load import load_config
        from gemoe_ds.data.sample import open_samples
        from gemoe_ds.train.estimate import estimate

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = load_config(RECIPE, [*self.options(), *self.more])
        return estimate(config, open_samples(self.data), self.ranks, device).total

    def train(self, steps: int, *more: str) -> list[dict[str, Any]]:
        """Train to `steps`; the phases."""
        options = [f"train.steps={steps}", f"checkpoint.every={self.steps}", *more]
        self.launched("train.py", RECIPE, *self.options(), *options)
        measured: list[dict[str, Any]] = json.loads((self.root / "run/profile.json").read_text())
        return measured

    def generate(self, top_k: int) -> list[dict[str, Any]]:
        run, out = self.root / "run", self.root / "answers"
        options = ["--trained", str(run), "--k", str(top_k), "--data", str(self.data)]
        options += ["--limit", "8", "--batch", "4", "--max-new-tokens", "16", "--rounds", "3"]
        options += ["--out", str(out), f"parallel.ep_size={self.ranks}"]
        self.launched("generate.py", str(run / "config.yaml"), *options)
        costs: list[dict[str, Any]] = json.loads((out / "throughput.json").read_text())["costs"]
        return costs

    def measure(self, *, answers: bool) -> dict[str, Any]:
        from gemoe_ds.models.backbone import Backbone

        backbone = Backbone.named(self.name)
        top_k = backbone.published_blocks()[0].routing.top_k
        disk = dd_rate(self.base)
        evict(self.base)
        first = self.train(self.steps, *self.more)
        again = self.train(2 * self.steps, "resume=auto", *self.more)
        kept = kept_bytes(self.base, self.ranks)
        total = sum(file.stat().st_size for file in self.base.glob("*.safetensors"))
        loading = next(phase for phase in first if phase["name"] == "loading")
        lines = (self.root / "run/metrics.jsonl").read_text().splitlines()
        return {
            "ranks": self.ranks,
            "checkpoint_bytes": total,
            "kept_bytes_per_rank": kept,
            "estimated_bytes_per_rank": self.estimated(),
            "device": _device(),
            "loading_peak_over_kept": round(max(loading["host_bytes"]) / kept, 3),
            "loading_node_over_checkpoint": round(sum(loading["share_bytes"]) / total, 3),
            "dd_bytes_per_s": round(disk),
            "read_bytes_per_s": round(total / loading["seconds"]),
            "phases": first,
            "phases_resumed": again,
            "last_step": {k: v for k, v in json.loads(lines[-1]).items() if "/layer_" not in k},
            "generation": self.generate(top_k) if answers else [],
        }


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def main() -> int:
    parser = Parser("python -m experiments.full_size", description=__doc__)
    parser.add_argument("--backbones", nargs="+", default=["olmoe"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/full_size.json"))
    parser.add_argument("--checkpoint", type=Path, help="a real folder, of the one backbone named")
    parser.add_argument("--turns", type=int, default=1, help="questions and answers a sample (1)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of the training"
    )
    parser.add_argument(
        "--quantise",
        choices=("float8", "int8", "nf4"),
        help="experts in few bits, from a folder "
        "that `gemoe export --quantise` writes from one in float8",
    )
    parser.add_argument("--no-answers", action="store_true", help="train only")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints on the disk")
    parser.add_argument("--again", action="store_true", help="remove the run of an earlier try")
    arguments = parser.parse_or_exit()
    real = arguments.checkpoint.absolute() if arguments.checkpoint else None
    os.chdir(CHECKOUT)
    from gemoe_ds.analysis.provenance import provenance

    with exit_on_error():
        if real and len(arguments.backbones) != 1:
            raise ConfigError("--checkpoint is of one backbone: name it with --backbones")
        measured = {}
        for name in arguments.backbones:
            one = FullSize(
                name,
                arguments.ranks,
                arguments.steps,
                real,
                arguments.turns,
                arguments.set,
                arguments.quantise,
            )
            one.prepare(again=arguments.again)
            seconds = one.quantise() if arguments.quantise else None
            measured[name] = one.measure(answers=not arguments.no_answers)
            measured[name]["seconds_to_quantise"] = seconds
            if not arguments.keep and not real:
                shutil.rmtree(one.base)
        report = {"backbones": measured} | provenance()
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"   report      {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
