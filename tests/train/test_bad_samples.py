"""Runs on data of which some cannot be used: each costs its own place, on any number of ranks."""

from __future__ import annotations

import json
import shutil

import pytest

from gemoe_ds.data.bad_samples import FILE
from gemoe_ds.data.sample import Turn, open_samples, write_samples
from tests.data.turns import cut_image, with_turns
from tests.helpers import run_ranks
from tests.train.resuming import make_config, train_all, write_setting
from tests.train.sample_logs import read_sample_log

EMPTY = {2: ["s9", "s7", "s17", "s6"]}  # the samples of step 2 of the run below, all of them bad
BROKEN, LONG = (9, 7), (17, 6)  # their rows
LONGEST = 64


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Images cut off after the conversion, and questions that leave no room for an answer."""
    setting = write_setting(tmp_path_factory.mktemp("bad samples"))
    good, data = open_samples(setting["data"]), setting["root"] / "harmed"
    samples = [good[row] for row in range(len(good))]
    for row in BROKEN:
        samples[row] = cut_image(samples[row], 200)
    for row in LONG:
        samples[row] = with_turns(samples[row], Turn("a " * LONGEST, "b"))
    write_samples(iter(samples), data, source="test")
    return setting | {"data": data}


def config_of(setting, output, ranks, **changes):
    defaults = {
        "parallel__ep_size": min(ranks, 2),
        "train": {"steps": 8, "micro_batch_size": 1, "global_batch_size": 4},
        "data__max_length": LONGEST,
        "monitor__sample_log": True,
    }
    return make_config(setting, output, **defaults | changes)


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_any_ranks_leave_out_the_same_and_go_on_with_any_budget(setting, tmp_path):
    """A whole run on one rank, on four, and one that two take over in the middle from the one."""
    outputs = {ranks: tmp_path / str(ranks) for ranks in (1, 2, 4)}
    over = config_of(setting, tmp_path / "over", 4, data__max_bad_samples=3)
    said = {
        ranks: run_ranks(train_all, ranks, [config_of(setting, outputs[ranks], ranks), *more])
        for ranks, more in ((1, []), (4, [over]))
    }
    assert said[1] == [None] and len({*said[4]}) == 1
    assert said[4][0].startswith("4 samples cannot be used, more than data.max_bad_samples=3;")
    for file in ("checkpoints/step-000003", "sample_log", FILE.parent):
        shutil.copytree(outputs[1] / file, outputs[2] / file)
    shutil.copy(outputs[1] / "metrics.jsonl", outputs[2])
    budget = {"data__max_bad_samples": 0.25, "data__max_length": LONGEST - 1, "resume": "auto"}
    assert run_ranks(train_all, 2, [config_of(setting, outputs[2], 2, **budget)]) == [None] * 2

    whole = losses_of_steps(outputs[1])
    assert [step for step in range(1, 9) if step not in whole] == [*EMPTY]
    for output in outputs.values():
        assert read_sample_log(output) == read_sample_log(outputs[1])
        assert read_sample_log(output)[2] == EMPTY[2]
        assert losses_of_steps(output) == pytest.approx(whole, rel=1e-5)
        listed = [json.loads(line) for line in (output / FILE).read_text().splitlines()]
        assert {entry["row"] for entry in listed} == {*BROKEN, *LONG} and len(listed) == 4
        lines = metrics(output)
        assert [line["empty_steps"] for line in lines] == [0, *[1] * 7]
        assert [line["skipped_steps"] for line in lines] == [0] * 8
        assert [line["data/left_out"] for line in lines] == [0, 4, 0, 0, 0, 1, 0, 3]
        assert lines[-1]["data/bad_samples"] == 4


def losses_of_steps(output):
    return {line["step"]: line["loss/total"] for line in metrics(output) if "loss/total" in line}
