"""An interrupted and resumed run equals the uninterrupted one; a wrong checkpoint is refused."""

from __future__ import annotations

import json
import shutil

import pytest

from gemoe_ds.checkpoint.manifest import checksum_folder, find
from gemoe_ds.checkpoint.state import load_trained, run_identity
from gemoe_ds.data.sample import open_samples
from gemoe_ds.errors import CheckpointError
from gemoe_ds.train.sample_log import read_sample_log
from tests.helpers import run_ranks
from tests.train.resuming import (
    BOUND,
    CUT,
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
        ({"train__micro_batch_size": 1}, "train.micro_batch_size"),
        (
            {"train__gradient_accumulation_steps": 4},
            "samples per step is 8, this run's is 16; set train.global_b",
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


PAIRS = {  # from any ranks, EP size and ZeRO stage to any other; `make resume` goes through all
    "routers": [
        (Setup(2, 2, 2), Setup(2, 2, 2)),
        (Setup(2, 2, 2), Setup(1, 1, 1)),
        (Setup(2, 2, 2), Setup(4, 2, 3)),
        (Setup(2, 2, 2), Setup(2, 1, 0)),
    ],
    "all": [
        (Setup(2, 2, 3), Setup(1, 1, 1)),
        (Setup(2, 2, 3), Setup(4, 4, 2)),
    ],
}


@pytest.mark.parametrize("train", PAIRS)
def test_a_run_goes_on_with_any_ranks_and_stages(setting, train):
    for pair, worst in zip(PAIRS[train], go_on(setting, PAIRS[train], train), strict=True):
        assert worst <= (0 if pair[0] == pair[1] else BOUND), pair


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


def full_disk_on_rank_1(rank: int, config) -> str | None:
    """Its second checkpoint does not fit."""
    from gemoe_ds.checkpoint import writer

    write, calls = writer.save_file, []

    def limited(tensors, path):
        calls.append(path)
        if rank == 1 and "step-000006" in str(path):
            raise OSError(28, "No space left on device", str(path))
        write(tensors, path)

    writer.save_file = limited
    return train_all(rank, [config])


def test_a_save_that_fails_on_one_rank_stops_all_and_harms_nothing(setting, tmp_path):
    output = tmp_path / "run"
    setup = Setup(2, 2, 2)  # trainable experts: both ranks write
    config = setup_config(setting, output, setup, "all")
    first, second = run_ranks(full_disk_on_rank_1, 2, config)
    assert first == second and "No space left" in first and "older ones are untouched" in first
    found, _ = find("auto", output, {})
    assert found is not None and found.step == CUT
    assert not list((output / "checkpoints").glob(".writing*")), "nothing half-written stays"
    goes_on = setup_config(setting, output, setup, "all", resume="auto")
    assert run_ranks(train_all, 2, [goes_on]) == [None, None]
    assert losses(output).keys() == set(range(1, 24))


def broken_after_a_save(rank: int, config) -> str | None:
    """Writing takes long, and the step after it fails."""
    import time

    from gemoe_ds.checkpoint import writer
    from gemoe_ds.errors import DataError
    from gemoe_ds.train.trainer import Trainer

    write, train_step = writer.save_file, Trainer.train_step

    def slow(tensors, path):
        time.sleep(1.5)
        write(tensors, path)

    def breaking(self, step, batches, *, collect):
        if step == CUT + 1:
            raise DataError("an image is broken")
        return train_step(self, step, batches, collect=collect)

    writer.save_file, Trainer.train_step = slow, breaking
    return train_all(rank, [config])


def test_a_run_that_breaks_lets_its_checkpoint_be_written(setting, tmp_path):
    config = setup_config(setting, tmp_path / "run", Setup(2, 2, 2), "routers")
    assert run_ranks(broken_after_a_save, 2, config) == ["an image is broken"] * 2
    found, _ = find("auto", tmp_path / "run", {})
    assert found is not None and found.step == CUT
