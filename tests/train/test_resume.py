"""An interrupted and resumed run equals the uninterrupted one; a wrong checkpoint is refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gemoe_ds.config.load import config_from_dict
from gemoe_ds.data.sample import Sample, Turn, write_samples
from gemoe_ds.engine.checkpoint import load_trained, run_identity
from gemoe_ds.engine.manifest import checksum_folder, find
from gemoe_ds.errors import CheckpointError
from tests.helpers import repository, run_ranks
from tests.tiny import write_base

STEPS, CUT = 6, 3


def write_data(folder: Path, number: int = 20, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)

    def sample(index: int) -> Sample:
        pixels = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        pixels.save(buffer, "PNG")
        words = [" ".join(rng.choice(list("abcdefgh"), rng.integers(1, 5))) for _ in range(4)]
        turns = (Turn(words[0], words[1], "x"), Turn(words[2], words[3], "y"))
        return Sample(f"s{index}", buffer.getvalue() if index % 5 else None, turns)

    write_samples(map(sample, range(number)), folder, source="test")
    return folder


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    hf, tokenizer = write_base(root)
    return {"root": root, "hf": hf, "tokenizer": tokenizer, "data": write_data(root / "data")}


def make_config(setting, output: Path, **changes):
    tree = {
        "output_dir": str(output),
        "model": {
            "backbone": {"name": "tiny"},
            "checkpoint": str(setting["hf"]),
            "router": {"name": "gemoe"},
            "dtype": "float32",
        },
        "data": {"train": str(setting["data"]), "tokenizer": str(setting["tokenizer"])},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "parallel": {"ep_size": 2},
        "train": {"steps": STEPS, "micro_batch": 2, "accumulation": 2},
        "checkpoint": {"every": CUT, "keep": 5},
        "monitor": {"every": 1},
        "deepspeed": str(repository() / "ds_configs/zero2.json"),
    }
    for path, value in changes.items():
        node = tree
        *parents, last = path.split("__")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return config_from_dict(tree)


def run(rank: int, configs: list):
    import deepspeed

    from gemoe_ds.engine import distributed as module
    from gemoe_ds.train.run import train

    with module.distributed() as world:  # one group for all runs of this process
        module_distributed = module.distributed
        import gemoe_ds.train.run as run_module

        run_module.distributed = lambda: _Kept(world)
        try:
            for config in configs:
                try:
                    train(config)
                except CheckpointError as error:
                    return str(error)
        finally:
            run_module.distributed = module_distributed
        assert deepspeed.comm.get_world_size() == 2
    return None


class _Kept:
    def __init__(self, world):
        self.world = world

    def __enter__(self):
        return self.world

    def __exit__(self, *_):
        return False


def losses(output: Path) -> dict[int, float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss/total"] for line in lines}


@pytest.fixture(scope="module")
def runs(setting):
    """An uninterrupted run, and one cut after `CUT` steps and resumed."""
    whole, cut = setting["root"] / "whole", setting["root"] / "cut"
    run_ranks(run, 2, [make_config(setting, whole)])
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / f"checkpoints/step-{STEPS:06d}")  # as if it had died after step 5
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:5]))
    run_ranks(run, 2, [make_config(setting, cut, resume="auto")])
    return whole, cut


def test_resumed_run_equals_the_uninterrupted_one(runs):
    whole, cut = runs
    assert losses(whole).keys() == set(range(1, STEPS + 1))
    assert losses(cut) == losses(whole), "no step twice, none lost, the same losses to the bit"
    first, second = (load_trained(r / f"checkpoints/step-{STEPS:06d}") for r in runs)
    assert all((first[name] == second[name]).all() for name in first)


def test_checkpoint_holds_only_what_trains(runs):
    stored = load_trained(runs[0] / f"checkpoints/step-{STEPS:06d}")
    assert {n.split(".router.")[1] for n in stored} == {"gate.weight", "eap.weight"}
    assert (runs[0] / "checkpoints/latest").read_text() == f"step-{STEPS:06d}"
    assert not list((runs[0] / "checkpoints").glob(".writing*"))


PER_LAYER = (
    "mean_k mean_k_image mean_k_text k_histogram_image k_histogram_text entropy_bits spearman "
    "load_max_over_mean idle_experts"
).split()


def test_metrics_have_every_loss_and_every_layer(runs):
    last = json.loads((runs[0] / "metrics.jsonl").read_text().splitlines()[-1])
    expected = {
        "loss/total",
        "loss/lm",
        "loss/monotonic",
        "loss/load_balance",
        "grad_norm",
        "mean_k",
    }
    for layer in ("layer_00", "layer_01"):
        expected |= {f"{name}/{layer}" for name in PER_LAYER}
    assert expected <= last.keys()
    tokens = sum(last["k_histogram_image/layer_00"]) + sum(last["k_histogram_text/layer_00"])
    mean_k = sum(
        k * (a + b)
        for k, (a, b) in enumerate(
            zip(last["k_histogram_image/layer_00"], last["k_histogram_text/layer_00"], strict=True)
        )
    )
    assert abs(mean_k / tokens - last["mean_k/layer_00"]) < 1e-9
    assert list((runs[0] / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model__router": {"name": "top_k"}}, "its model.router is"),
        ({"seed": 5}, "its seed is 0, this run's is 5"),
        ({"train__micro_batch": 1}, "train.micro_batch"),
    ],
)
def test_foreign_checkpoints_are_refused(setting, runs, change, words):
    config = make_config(setting, runs[0], resume="auto", **change)
    identity = run_identity(config, 2, open_fingerprint(setting), checksum_folder(setting["hf"]))
    with pytest.raises(CheckpointError, match="belongs to another run") as error:
        find("auto", runs[0], identity)
    assert words in str(error.value)


def open_fingerprint(setting) -> str:
    from gemoe_ds.data.sample import open_samples

    return open_samples(setting["data"]).fingerprint
