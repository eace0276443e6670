"""Training on packed rows: what is told before it, what is refused, and that it resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from gemoe_ds.data.mixture import open_training
from gemoe_ds.data.sample import Message, Sample, write_samples
from gemoe_ds.errors import ConfigError, DataError
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.train import run as module
from gemoe_ds.train.assemble import build_model, check_attention, meta_collator
from gemoe_ds.train.checks.samples import check_samples
from gemoe_ds.train.estimate import estimate
from gemoe_ds.train.run import train
from tests.helpers import run_ranks
from tests.models.cases import write_text
from tests.train.resuming import make_config, one_group, train_all, write_setting
from tests.train.sample_logs import read_sample_log

ROOM = 24


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Talks, and texts of another folder, which is gone through twice."""
    setting = write_setting(tmp_path_factory.mktemp("packed"))
    texts = (
        Sample(f"t{i}", (Message("text", "a b c d e f g h"[: 1 + 2 * (i % 8)]),)) for i in range(9)
    )
    write_samples(texts, setting["root"] / "texts", source="test")
    return setting | {"talks": write_text(setting["root"] / "talks")}


def config_of(setting, output, **changes):
    defaults = {
        "data__train_path": [
            {"path": str(setting["talks"])},
            {"path": str(setting["root"] / "texts"), "repeat": 2},
        ],
        "data__max_length": ROOM,
        "data__pack": True,
        "parallel__ep_size": 1,
        "monitor__sample_log": True,
        "train": {"steps": 6, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
    }
    return make_config(setting, output, **defaults | changes)


def checked(config):
    return check_samples(config, open_training(config.data.train_path), meta_collator(config))


def metrics_of(output):
    lines = map(json.loads, (Path(output) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines}


def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(setting, tmp_path):
    with one_group(module):
        train(config_of(setting, tmp_path / "whole"))
        train(config_of(setting, tmp_path / "cut", train__steps=3))
        train(config_of(setting, tmp_path / "cut", resume="auto"))
    whole, cut = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "cut")
    assert whole.keys() == cut.keys() == set(range(1, 7))
    for step, line in whole.items():
        for name in ("loss/total", "loss/lm", "train/loss/talks", "train/tokens/texts"):
            assert cut[step][name] == pytest.approx(line[name], rel=1e-6), (step, name)
    seen = read_sample_log(tmp_path / "whole")
    assert seen == read_sample_log(tmp_path / "cut")
    assert sum(map(len, seen.values())) > 6 * 4 * 1.8, "several samples in each of 24 rows"
    tokens = whole[1]["train/tokens/talks"] + whole[1]["train/tokens/texts"]
    assert 0.7 * 4 * ROOM < tokens <= 4 * ROOM
    with pytest.raises(Exception, match=r"data\.pack.*false"):
        other = config_of(setting, tmp_path / "cut", resume="auto", data__pack=False)
        with one_group(module):
            train(other)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["routers", "all"])
def test_ranks_that_share_experts_learn_what_one_rank_does(setting, tmp_path, trained):
    """One rank, two and four, and two that take over in the middle from the one.

    Without the monotonic loss: it is a mean over pairs of different entropies, and tokens behind
    the same words, of which these texts have many, differ in entropy by rounding alone.
    """

    def config(ranks, **changes):
        options = {
            "model__router": {"name": "gemoe", "monotonic_weight": 0.0},
            "parallel__ep_size": min(ranks, 2),
            "model__trainable": trained,
            "optim__eps": 1e-3,  # so that Adam does not make steps of what was rounded
            "optim__lr": 1e-2 if trained == "routers" else 2e-3,
            "train": {"steps": 6, "micro_batch_size": 1, "global_batch_size": 4},
            "checkpoint": {"every": 3, "keep": 9},
        }
        return config_of(setting, tmp_path / str(ranks), **options | changes)

    for ranks in (1, 2, 4):
        assert run_ranks(train_all, ranks, [config(ranks)]) == [None] * ranks
    for part in ("checkpoints/step-000003", "sample_log", "metrics.jsonl"):
        copied = shutil.copytree if (tmp_path / "1" / part).is_dir() else shutil.copy
        (tmp_path / "over" / part).parent.mkdir(parents=True, exist_ok=True)
        copied(tmp_path / "1" / part, tmp_path / "over" / part)
    over = config(2, output_dir=str(tmp_path / "over"), resume="auto")
    assert run_ranks(train_all, 2, [over]) == [None] * 2

    one, seen = metrics_of(tmp_path / "1"), read_sample_log(tmp_path / "1")
    names = ["loss/total", "loss/lm", "loss/load_balance", "grad_norm"]
    names += [f"train/{name}/{of}" for of in ("talks", "texts") for name in ("loss", "mean_k")]
    for other in ("2", "4", "over"):
        assert read_sample_log(tmp_path / other) == seen
        for step, line in metrics_of(tmp_path / other).items():
            for name in names:
                assert line[name] == pytest.approx(one[step][name], rel=1e-4), (other, step, name)
    assert len({line["loss/lm"] for line in one.values()}) == 6


def test_it_is_said_how_full_rows_are_and_what_epochs_come_to(setting, tmp_path, capsys):
    config = config_of(setting, tmp_path, train__steps=None, train__epochs=2)
    selection = checked(config).selection
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("  packed: ")]
    words = line.replace(",", "").split()
    samples, rows, valid = int(words[1]), int(words[4]), float(words[9].rstrip("%"))
    tokens = int(selection.length_M[:20].sum() + 2 * selection.length_M[20:].sum())
    assert samples == 20 + 2 * 9 and valid == pytest.approx(100 * tokens / (rows * ROOM), abs=0.1)
    assert valid > 85
    steps = -(-2 * rows // 4)
    assert f"train.epochs=2 of {rows} rows, 4 a step: {steps} steps" in said


def test_pictures_and_grouping_are_refused(setting, tmp_path):
    with pytest.raises(DataError, match=r"^data.pack=true: 16 samples have pictures \(sample s1 i"):
        checked(config_of(setting, tmp_path, data__train_path=str(setting["data"])))
    with pytest.raises(ConfigError, match="data.group_by_length=true: packed rows are all full"):
        config_of(setting, tmp_path, data__group_by_length=True)


def test_attention_that_would_see_other_documents_is_refused(setting, tmp_path):
    """Its kernels would be told of documents in micro-batches of one row alone."""
    config = config_of(setting, tmp_path)
    hf = build_model(config, ExpertShard()).hf
    check_attention(config, hf)
    hf.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="attention is 'flash_attention_2', and packed rows are"):
        check_attention(config, hf)
    check_attention(config_of(setting, tmp_path, data__pack=False), hf)


def test_the_estimate_is_of_full_rows(setting, tmp_path):
    found = {}
    for pack in (False, True):
        config = config_of(setting, tmp_path, data__pack=pack)
        samples = open_training(config.data.train_path)
        found[pack] = estimate(config, samples, 1, torch.device("cuda")).parts
    assert found[True]["masks of packed rows"] == 2 * ROOM**2 * 5
    more = {name for name, size in found[True].items() if size > found[False][name]}
    assert len(more) > 3, "tokens are more, and what they take"
