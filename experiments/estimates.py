"""What recipes that ship are estimated to take of a GPU, as the pages say: results/estimates.json.

    python -m experiments.estimates

asks what `gemoe train RECIPE --estimate N` asks, for samples of one size, of folders that have a
public model's config.json and the headers of its weights. No weights and no GPU are needed, and no
GPU was measured.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from experiments import CHECKOUT
from experiments.full_size import picture
from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.config import RunConfig
from gemoe_ds.config.load import load_config
from gemoe_ds.data.mixture import open_training
from gemoe_ds.data.sample import Turn, of_turns, write_samples
from gemoe_ds.errors import exit_on_error
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.random_checkpoint import write_headers, write_stand_in_tokenizer
from gemoe_ds.parser import Parser
from gemoe_ds.train.estimate import estimate

SHARDS = 8
SAMPLES = 16  # as many as the largest micro-batch has
QUESTION = 4  # tokens; the answer, which is learned, has the rest


@dataclass(frozen=True)
class Size:
    """Of every sample: width and height of its picture, tokens of its question and answer."""

    pixels: tuple[int, int] | None
    text_tokens: int


WITH_PICTURE, TEXT_ONLY = Size((640, 480), 70), Size(None, 2000)
WORDS = [f"w{place}" for place in range(TEXT_ONLY.text_tokens)]  # each is a token


@dataclass(frozen=True)
class Run:
    """A recipe on so many ranks, `ep_size` of which share the experts."""

    recipe: str
    ranks: int
    ep_size: int

    @property
    def options(self) -> list[str]:
        return [f"parallel.ep_size={self.ep_size}"]


RUNS = (
    *(
        Run(f"{backbone}_gemoe_{machines}", ranks, 8)
        for backbone in ("olmoe", "molmoe", "deepseek_vl2", "qwen3_vl")
        for machines, ranks in (("8_gpus", 8), ("4_nodes", 32))
    ),
    Run("qwen3_vl_gemoe_1_gpu_24gb", 1, 1),
    Run("qwen3_vl_gemoe_1_gpu_48gb", 1, 1),
)


def write_data(size: Size, folder: Path) -> None:
    words = WORDS[: size.text_tokens]
    turn = Turn(" ".join(words[:QUESTION]), " ".join(words[QUESTION:]))
    samples = (
        of_turns(f"n{number}", picture(number, size.pixels) if size.pixels else None, (turn,))
        for number in range(SAMPLES)
    )
    write_samples(samples, folder, source="experiments/estimates.py")


class Estimates:
    """Folders of models and of samples below `root`, each written when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def paths(self, config: RunConfig) -> tuple[list[str], Size]:
        """Options that lead a recipe to what stands for its files, and the size of a sample."""
        backbone = Backbone.named(config.model.backbone.name)
        float8 = str(config.model.checkpoint).endswith("-FP8")
        base = self.root / f"{backbone.name}{'_fp8' if float8 else ''}"
        if not base.exists():
            write_headers(backbone, base, shards=SHARDS, float8=float8)
            write_stand_in_tokenizer(backbone, WORDS, base)
        sees = backbone(backbone.Config()).image_layout(backbone.published()) is not None
        size = WITH_PICTURE if sees else TEXT_ONLY
        data = self.root / ("pictures" if sees else "texts")
        if not data.exists():
            write_data(size, data)
        keys = {"model.checkpoint": base, "data.tokenizer": base, "data.train_path": data}
        return [f"{key}={path}" for key, path in keys.items()], size

    def row(self, run: Run) -> dict[str, Any]:
        """GiB of a rank: what torch allocates, by what it holds, and what lies beside that."""
        paths, size = self.paths(load_config(run.recipe))
        config = load_config(run.recipe, [*paths, *run.options])
        samples = open_training(config.data.train_path)
        found = estimate(config, samples, run.ranks, torch.device("cuda"))
        return {
            "recipe": run.recipe,
            "ranks": run.ranks,
            "ep_size": config.ep_size,
            "options": run.options,
            "micro_batch_size": config.train.micro_batch_size,
            "sample": asdict(size),
            "gib": _gib(found.total),
            "beside_gib": _gib(sum(found.beside.values())),
            "parts_gib": {name: _gib(part) for name, part in found.parts.items() if part},
        }


def _gib(size: int) -> float:
    return round(size / 2**30, 3)


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    found = []
    with TemporaryDirectory() as root:
        estimates = Estimates(Path(root))
        for run in runs:
            found.append(estimates.row(run))
            print(f"{run.recipe} on {run.ranks}: {found[-1]['gib']:.2f} GiB", flush=True)
    return found


def main() -> int:
    parser = Parser("python -m experiments.estimates", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/estimates.json"))
    arguments = parser.parse_or_exit()
    os.chdir(CHECKOUT)
    with exit_on_error():
        report = {"rows": rows(RUNS)} | provenance()
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"   report      {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
