"""A run on data of which an image has gone bad since they were converted."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from gemoe_ds.data.sample import open_samples, write_samples
from gemoe_ds.train.ledger import read_ledger
from tests.helpers import run_ranks
from tests.train.resuming import losses, make_config, train_all, write_setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("quarantine"))


@pytest.fixture(scope="module")
def harmed(setting):
    """Two images of 20 samples are cut off."""
    good, data = open_samples(setting["data"]), setting["root"] / "harmed"
    samples = [good[row] for row in range(len(good))]
    for row in (1, 7):
        samples[row] = replace(samples[row], image=samples[row].image[:40])
    write_samples(iter(samples), data, source="test")
    return setting | {"data": data}


def test_a_broken_image_costs_its_own_sample_and_nothing_else(setting, harmed, tmp_path):
    outputs = [tmp_path / "whole", tmp_path / "harmed"]
    many = {"train": {"steps": 6, "micro_batch": 2, "accumulation": 2}, "monitor__ledger": True}
    configs = [
        make_config(which, output, **many)
        for which, output in zip((setting, harmed), outputs, strict=True)
    ]
    assert run_ranks(train_all, 2, configs) == [None, None]
    assert read_ledger(outputs[0]) == read_ledger(outputs[1]), "order kept"
    first, second = map(losses, outputs)
    assert first.keys() == second.keys() and first != second
    assert all(math.isfinite(value) for value in second.values())
    files = sorted((outputs[1] / "quarantine").iterdir())
    listed = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert {entry["id"] for entry in listed} == {"s1", "s7"}
    assert not (outputs[0] / "quarantine").exists()


def test_too_many_stop_the_run_with_a_line(harmed, tmp_path):
    config = make_config(
        harmed, tmp_path / "run", data__max_broken=1, train__steps=20, parallel__ep_size=1
    )
    (said,) = run_ranks(train_all, 1, [config])
    assert said and said.startswith("sample s"), said
    assert said.endswith("convert the data again (data.max_broken=1 are left out)")
