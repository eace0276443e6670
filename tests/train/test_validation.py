"""Validation while training: the right numbers at the right steps, no trace in the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gemoe_ds.checkpoint.state import load_trained_weights
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.data.sample import open_samples
from gemoe_ds.data.stream import EvalStream
from gemoe_ds.engine.world import ALONE
from gemoe_ds.errors import Stopped
from gemoe_ds.evaluation.score import evaluate
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.train.assemble import build_collator, build_model
from gemoe_ds.train.hooks import Hook
from tests.data.turns import turns_of
from tests.helpers import repository, run_ranks
from tests.train.resuming import make_config, one_group, train_all, write_data, write_setting

STEPS, EVERY, CUT = 5, 2, 3
EVALUATED = [2, 4, 5]  # the last step too


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("validation")
    return write_setting(root) | {
        "held out": write_data(root / "held out", 5, seed=9),  # three batches for two ranks
        "few": write_data(root / "few", 2, seed=9),  # one batch
    }


def config_of(setting, name: str, data: str | None = "held out", zero: int = 3, **changes):
    if data:
        changes |= {"data__validation_path": str(setting[data]), "train__eval_every": EVERY}
    return make_config(
        setting,
        setting["root"] / name,
        train={"steps": STEPS, "micro_batch_size": 2},
        model__router={"name": "gemoe", "k_low": 0, "k_high": 6},
        deepspeed=str(repository() / f"ds_configs/zero{zero}.json"),
        checkpoint={"every": 1, "keep": 50},
        **changes,
    )


SAID = "SIGTERM to rank 1, after step 2; resume=auto goes on from there"


def train_and_stop(rank: int, configs: list, stopped) -> str:
    """Train all; rank 1 of the last one is asked to stop in step 2, before its evaluation."""
    import gemoe_ds.train.run as module

    stop = StopRequest()

    class Asks(Hook):
        def before_step(self, trainer, step, batches) -> None:
            if step == 2 and rank == 1:
                stop.by = "SIGTERM"

    with one_group(module):
        for config in configs:
            module.train(config)
        try:
            module.train(stopped, stop=stop, hooks=[Asks()])
        except Stopped as error:
            return str(error)
    return "it went on"


@pytest.fixture(scope="module")
def runs(setting):
    """On two ranks that share the experts, under ZeRO 3: without, with, and cut after `CUT`."""
    without = config_of(setting, "without", None)
    whole = config_of(setting, "whole")
    few = config_of(setting, "few samples", "few", zero=2)
    stopped = config_of(setting, "stopped", zero=2)
    assert run_ranks(train_and_stop, 2, [without, whole, few], stopped) == [SAID, SAID]
    cut = setting["root"] / "cut"
    shutil.copytree(setting["root"] / "whole", cut)
    for step in range(CUT + 1, STEPS + 1):
        shutil.rmtree(cut / f"checkpoints/step-{step:06d}")
    resumed = config_of(setting, "cut", resume="auto")
    goes_on = config_of(setting, "stopped", zero=2, resume="auto")
    assert run_ranks(train_all, 2, [resumed, goes_on]) == [None, None]
    return {"without": without, "whole": whole, "few": few, "cut": resumed, "stopped": goes_on}


def metrics(config) -> dict[int, dict]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def validation(config, *names: str) -> dict[int, list[float]]:
    names = names or ("loss", "accuracy", "mean_k")
    return {
        step: [line[f"validation/{name}"] for name in names]
        for step, line in metrics(config).items()
        if "validation/loss" in line
    }


def test_training_goes_on_as_without_it(runs):
    without, whole = metrics(runs["without"]), metrics(runs["whole"])
    assert without.keys() == whole.keys() == set(range(1, STEPS + 1))
    for step, line in without.items():
        for name in line:
            if not name.startswith("throughput/"):
                assert whole[step][name] == line[name], (step, name)
    assert validation(runs["without"]) == {}


@pytest.mark.parametrize("name", ["whole", "few"])
def test_the_values_are_those_of_the_samples_one_by_one(runs, name):
    config = runs[name]
    found = validation(config)
    assert list(found) == EVALUATED
    model = build_model(config, ExpertShard())
    samples, collator = open_samples(config.data.validation_path), build_collator(config, model)
    for step in (2, 5):
        load_trained_weights(model, Path(config.output_dir) / f"checkpoints/step-{step:06d}")
        model.eval().ctx.trace = True
        loss, targets, k, right, asked = 0.0, 0, [], {}, {}
        for row in range(len(samples)):
            batch = collator.batch([collator.encode(row, samples[row])])
            with torch.no_grad():
                loss += model(**batch.inputs, targets_per_micro_batch=1.0)["lm"].item()
                correct_BS = model(**batch.inputs, score=True)["correct_BS"]
            targets += batch.num_targets
            k.append(torch.stack([record.k_T for record in model.ctx.layers]))
            for index, turn in enumerate(turns_of(samples[row])):
                is_answer_BS = batch.turn_BS == index
                right[turn.kind] = right.get(turn.kind, 0) + bool(correct_BS[is_answer_BS].all())
                asked[turn.kind] = asked.get(turn.kind, 0) + 1
        accuracy = sum(right[kind] / asked[kind] for kind in asked) / len(asked)
        mean_k = torch.cat(k, 1).double().mean().item()
        assert found[step] == pytest.approx([loss / targets, accuracy, mean_k], rel=1e-5)
    assert found[2][0] != found[5][0], "it has trained in between"


def test_a_continuation_evaluates_at_the_same_steps_and_finds_the_same(runs):
    names = ["loss", "accuracy", "mean_k", "untouched_static_loss", "untouched_score_accuracy"]
    assert validation(runs["cut"], *names) == validation(runs["whole"], *names)


def test_the_untouched_backbone_at_the_same_mean_k(runs):
    """Experts shared under ZeRO 3, against whole ones in one process."""
    config = runs["whole"]
    found = validation(config, "mean_k", "untouched_static_loss", "untouched_static_accuracy")
    model = build_model(config, ExpertShard())
    samples, collator = open_samples(config.data.validation_path), build_collator(config, model)
    for layer in model.moe_layers:
        layer.router = layer.base
    values = {}
    for k in range(1, 7):
        for layer in model.moe_layers:
            layer.base.k = k
        stream = EvalStream(samples, collator, batch=5, rank=0, world=1)
        scores = evaluate(model, samples, stream, torch.device("cpu"), ALONE)
        assert scores.mean_k == k
        values[k] = np.array([scores.loss, scores.accuracy])
    for mean_k, *pair in found.values():
        low = int(mean_k)
        wanted = (low + 1 - mean_k) * values[low] + (mean_k - low) * values[low + 1]
        assert pair == pytest.approx(wanted.tolist(), rel=1e-5)


def test_an_evaluation_that_was_cut_off_comes_after_the_next_step(runs):
    assert list(validation(runs["stopped"])) == [3, 4, 5]
