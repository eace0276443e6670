"""An interrupted and resumed run equals the uninterrupted one; a wrong checkpoint is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemoe_ds.checkpoint.identity import check_identity, run_identity
from gemoe_ds.checkpoint.manifest import checksum_folder, find
from gemoe_ds.checkpoint.state import load_trained
from gemoe_ds.data.sample import open_samples
from gemoe_ds.errors import CheckpointError
from gemoe_ds.train.assemble import meta_collator
from tests.helpers import run_ranks
from tests.train.resuming import (
    BOUND,
    Setup,
    cut_run,
    go_on,
    losses,
    make_config,
    setup_config,
    train_all,
    whole_run,
    write_setting,
)
from tests.train.sample_logs import read_sample_log

STEPS = 6


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def runs(setting):
    """An uninterrupted run, and one cut after `CUT` steps and resumed."""
    whole, cut = setting["root"] / "whole", setting["root"] / "cut"
    run_ranks(train_all, 2, [make_config(setting, whole, monitor__tensorboard=True)])
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / f"checkpoints/step-{STEPS:06d}")  # as if it had died after step 5
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:5]))
    run_ranks(train_all, 2, [make_config(setting, cut, resume="auto")])
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
        (
            {"model__router": {"name": "top_k"}},
            "router.name is gemoe, this run's is top_k; ",
        ),
        ({"seed": 5}, "its seed is 0, this run's is 5"),
        (
            {"train__micro_batch_size": 1, "train__gradient_accumulation_steps": 4},
            "its train.auxiliary_batch_size is 2, this run's is 1, and so many samples share "
            "monotonic (monotonic_weight), load_balance (balance_weight); set "
            "train.auxiliary_batch_size=2 and a multiple of it as train.micro_batch_size, or",
        ),
        (
            {"train__gradient_accumulation_steps": 4},
            "samples per step is 8, this run's is 16; set train.global_b",
        ),
        (
            {"data__group_by_length": True},
            "group_by_length is false, this run's is true in epochs with data.max_length=2048",
        ),
    ],
)
def test_foreign_checkpoints_are_refused(setting, runs, change, words):
    config = make_config(setting, runs[0], resume="auto", **change)
    read = {"base checkpoint": checksum_folder(setting["hf"])}
    identity = run_identity(config, 2, open_samples(setting["data"]).fingerprint, read)
    with pytest.raises(CheckpointError, match="belongs to another run") as error:
        find("auto", runs[0], identity)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "router, before, now, words",
    [
        ({"name": "gemoe"}, (2, None), (4, 2), None),
        ({"name": "gemoe"}, (4, 1), (1, None), None),
        ({"name": "top_k", "balance_weight": 0.0}, (4, None), (1, None), None),
        ({"name": "top_k", "balance_weight": 0.0, "entropy_target": 1.0}, (4, None), (1, None), ""),
        ({"name": "threshold", "balance_weight": 0.0}, (2, None), (1, None), "each sequence draws"),
        ({"name": "ada_k"}, (2, None), (1, None), "its train.micro_batch_size is 2, this run's is"),
    ],
)
def test_another_micro_batch_is_refused_where_it_would_change_the_run(
    setting, tmp_path, router, before, now, words
):
    """Also after a checkpoint of a version that had the micro-batch in its identity."""

    def identity(sizes: tuple[int, int | None]) -> dict[str, Any]:
        train = {"micro_batch_size": sizes[0], "auxiliary_batch_size": sizes[1]}
        train |= {"steps": 2, "global_batch_size": 4}
        return run_identity(
            make_config(setting, tmp_path, model__router=router, train=train), 1, "data", {}
        )

    stored = identity(before)
    older = {k: v for k, v in stored.items() if k != "train.auxiliary_batch_size"}
    older["train.micro_batch_size"] = before[1] or before[0]
    for one in (stored, older):
        if words is None:
            check_identity(tmp_path, one, identity(now))
        else:
            with pytest.raises(CheckpointError, match="belongs to another run") as error:
                check_identity(tmp_path, one, identity(now))
            assert words in str(error.value)


MOVES = [  # from any ranks, EP size and ZeRO stage to any other; `make resume` goes through all
    ("routers", Setup(2, 2, 2), Setup(1, 1, 1)),
    ("routers", Setup(2, 2, 2), Setup(4, 2, 3)),
    ("routers", Setup(2, 2, 2), Setup(2, 1, 0)),
    ("all", Setup(2, 2, 3), Setup(1, 1, 1)),
    ("all", Setup(2, 2, 3), Setup(4, 4, 2)),
]


def test_a_run_goes_on_with_any_ranks_and_stages(setting):
    for move, worst in zip(MOVES, go_on(setting, MOVES), strict=True):
        assert worst <= BOUND, move


def test_the_sample_log_of_a_run_cut_twice_is_the_uninterrupted_one(setting):
    """After the second cut on another number of ranks; each stretch is partly lost."""
    whole, config = whole_run(setting, Setup(2, 1, 2), "routers")
    if not whole.exists():
        run_ranks(train_all, 2, [config])
    output, _ = cut_run(setting, Setup(2, 1, 2), Setup(4, 1, 2), "routers")
    for ranks, last in ((2, 9), (4, 15), (1, 23)):
        config = setup_config(setting, output, Setup(ranks, 1, 2), "routers", resume="auto")
        run_ranks(train_all, ranks, [config])
        lost = output / f"checkpoints/step-{last:06d}"
        if last < 23:
            for folder in (output / "checkpoints").glob("step-*"):
                if folder.name > lost.name:
                    shutil.rmtree(folder)
    assert read_sample_log(output) == read_sample_log(whole)
    assert all(len(set(ids)) == 4 for ids in read_sample_log(whole).values())


@pytest.mark.slow
def test_steps_of_like_length_are_the_same_on_any_ranks_and_after_a_cut(setting):
    def run(name: str, ranks: int, **changes: Any) -> Path:
        output = setting["root"] / name
        config = setup_config(
            setting, output, Setup(ranks, 1, 2), "routers", data__group_by_length=True, **changes
        )
        run_ranks(train_all, ranks, [config])
        return output

    whole = read_sample_log(run("by_length", 2))
    output = run("by_length_cut", 2, train__steps=7)
    run("by_length_cut", 4, resume="auto")
    assert read_sample_log(output) == whole
    collator = meta_collator(setup_config(setting, output, Setup(1, 1, 2), "routers"))
    folder = open_samples(setting["data"])
    samples = [folder[row] for row in range(len(folder))]
    tokens = {sample.id: len(collator.encode(0, sample).input_ids) for sample in samples}
    spread = [np.ptp([tokens[i] for i in ids]) for ids in whole.values()]
    assert np.mean(spread) < 0.5 * np.ptp([*tokens.values()])
