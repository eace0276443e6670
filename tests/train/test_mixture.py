"""Training on a mixture, by epochs, with samples held out of it: what each step sees, and what is
said of each source, against samples one by one in one process."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gemoe_ds.checkpoint.identity import run_identity
from gemoe_ds.checkpoint.manifest import find
from gemoe_ds.checkpoint.state import load_trained, load_trained_weights
from gemoe_ds.data.holdout import held_out_rows
from gemoe_ds.data.mixture import open_training
from gemoe_ds.data.sample import open_samples, write_samples
from gemoe_ds.errors import CheckpointError
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.train.assemble import build_collator, build_model
from tests.helpers import run_ranks
from tests.train.resuming import make_config, train_all, write_data, write_setting
from tests.train.sample_logs import read_sample_log

NAMES = ("few", "many", "half")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    setting = write_setting(root)
    for seed, (name, number) in enumerate(zip(NAMES, (6, 20, 10), strict=True), 1):
        write_data(root / f"of_{name}", number, seed=seed)
        rename(root / f"of_{name}", root / name, name)
    return setting


def rename(source: Path, target: Path, name: str) -> None:
    """The samples under ids that tell where they are from."""
    folder = open_samples(source)
    samples = (folder[row] for row in range(len(folder)))
    write_samples((replace(s, id=f"{name}-{s.id}") for s in samples), target, source="test")


def config_of(setting, name: str, **changes):
    parts = [
        {"path": str(setting["root"] / "few"), "repeat": 2},
        {"path": str(setting["root"] / "many"), "limit": 12},
        {"path": str(setting["root"] / "half"), "repeat": 0.5},
    ]
    return make_config(
        setting,
        setting["root"] / name,
        **{
            "data__train_path": parts,
            "data__holdout": 5,
            "data__group_by_length": True,
            "train": {"epochs": 2, "micro_batch_size": 2, "global_batch_size": 8, "eval_every": 3},
            "checkpoint": {"every": 1, "keep": 50},
            "monitor__sample_log": True,
            "train__compare_untouched": False,
        }
        | changes,
    )


@pytest.fixture(scope="module")
def run(setting):
    """On two ranks that share the experts."""
    config = config_of(setting, "whole")
    assert run_ranks(train_all, 2, [config]) == [None, None]
    output = Path(config.output_dir)
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    mixture = open_training(config.data.train_path)
    held = {mixture[row].id for row in held_out_rows(mixture, 5)}
    return SimpleNamespace(
        config=config,
        output=output,
        metrics={line["step"]: line for line in lines},
        seen=read_sample_log(output),
        held=held,
        samples={mixture[row].id: mixture[row] for row in range(len(mixture))},
    )


def source_of(sample_id: str) -> str:
    return sample_id.partition("-")[0]


def sizes_of(run) -> dict[str, int]:
    """Samples of each part that are not held out."""
    return Counter(source_of(i) for i in run.samples if i not in run.held)


def test_an_epoch_takes_what_repeats_and_limits_say_and_nothing_held_out(run):
    sizes = sizes_of(run)
    drawn = {"few": 2 * sizes["few"], "many": 12, "half": round(sizes["half"] / 2)}
    epoch = sum(drawn.values())
    steps = -(-2 * epoch // 8)
    assert set(run.metrics) == set(run.seen) == set(range(1, steps + 1))
    ids = [i for step in run.seen.values() for i in step]
    assert not run.held & set(ids) and len(run.held) == 5
    count = Counter(ids)
    over = 8 * steps - 2 * epoch  # of the third epoch
    of_source = Counter(source_of(i) for i in ids)
    assert all(2 * drawn[n] <= of_source[n] <= 2 * drawn[n] + over for n in NAMES)
    limited = [i for i in count if source_of(i) == "many"]
    assert len(limited) == 12 < sizes["many"]
    assert all(count[i] >= 4 for i in count if source_of(i) == "few")
    assert len({i for i in count if source_of(i) == "half"}) >= 2 * drawn["half"], "none twice yet"


def by_hand(run, model, collator, ids) -> tuple[float, float, int, int]:
    """Loss and mean k of samples one by one, and their tokens and targets."""
    loss, k, tokens, targets = 0.0, 0.0, 0, 0
    for sample_id in ids:
        batch = collator.batch([collator.encode(0, run.samples[sample_id])])
        with torch.no_grad():
            loss += model(**batch.inputs, targets_per_micro_batch=1.0)["lm"].item()
        k += sum(float(record.k_T.sum()) for record in model.ctx.layers) / len(model.ctx.layers)
        tokens, targets = tokens + int(batch.is_valid_BS.sum()), targets + batch.num_targets
    return loss / targets, k / tokens, tokens, targets


def test_loss_k_and_tokens_of_each_source_are_those_of_its_samples_one_by_one(run):
    model = build_model(run.config, ExpertShard())
    collator = build_collator(run.config, model)
    model.ctx.trace = True
    for step in (1, 4):
        if step > 1:
            load_trained_weights(model, run.output / f"checkpoints/step-{step - 1:06d}")
        line, sums = run.metrics[step], np.zeros(4)
        for name in NAMES:
            ids = [i for i in run.seen[step] if source_of(i) == name]
            if not ids:
                assert f"train/loss/{name}" not in line and line[f"train/tokens/{name}"] == 0
                continue
            loss, k, tokens, targets = by_hand(run, model, collator, ids)
            assert line[f"train/loss/{name}"] == pytest.approx(loss, rel=1e-5)
            assert line[f"train/mean_k/{name}"] == pytest.approx(k, rel=1e-9)
            assert line[f"train/tokens/{name}"] == tokens
            sums += [loss * targets, targets, k * tokens, tokens]
        assert line["loss/lm"] == pytest.approx(sums[0] / sums[1], rel=1e-5)
        assert line["mean_k"] == pytest.approx(sums[2] / sums[3], rel=1e-9)
    assert len({source_of(i) for i in run.seen[1] + run.seen[4]}) == 3


def test_what_is_held_out_is_evaluated(run):
    model = build_model(run.config, ExpertShard())
    last = max(run.metrics)
    evaluated = [step for step, line in run.metrics.items() if "validation/loss" in line]
    assert evaluated == sorted({*range(3, last + 1, 3), last})
    load_trained_weights(model, run.output / f"checkpoints/step-{last:06d}")
    model.eval().ctx.trace = True
    loss, k, _, _ = by_hand(run, model, build_collator(run.config, model), sorted(run.held))
    assert run.metrics[last]["validation/loss"] == pytest.approx(loss, rel=1e-5)
    assert run.metrics[last]["validation/mean_k"] == pytest.approx(k, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data__holdout": 6}, "its data.holdout is 5, this run's is 6"),
        ({"data__holdout": 0, "train__eval_every": 0}, "its data.holdout is 5, this run's is 0"),
        ({"repeat": 3}, "data.train_path's parts is"),
        ({"limit": 11}, "data.train_path's parts is"),
        ({"fewer": True}, "what is in its data.train_path is not"),
    ],
)
def test_a_run_on_another_mixture_is_another_run(setting, run, change, words):
    parts = [part.model_dump() for part in run.config.data.train_path]
    changes = {key: value for key, value in change.items() if key.startswith(("data", "train"))}
    if "fewer" in change:
        del parts[2]
    for key in change.keys() & {"repeat", "limit"}:
        parts[0][key] = change[key]
    config = config_of(setting, "whole", data__train_path=parts, **changes)
    identity = run_identity(config, 2, open_training(config.data.train_path).fingerprint, {})
    with pytest.raises(CheckpointError, match=words):
        find("auto", run.output, identity)


def test_names_do_not_make_another_run(setting, run):
    parts = [p.model_dump() | {"name": f"x{n}"} for n, p in enumerate(run.config.data.train_path)]
    config = config_of(setting, "whole", data__train_path=parts)
    fingerprint = open_training(config.data.train_path).fingerprint
    find("auto", run.output, run_identity(config, 2, fingerprint, {}))


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [True, False])
def test_training_on_a_mixture_cut_twice_equals_the_uncut_run(setting, run, grouped):
    """On as many ranks to the bit; then on four, which see the same samples in the same steps."""
    whole, output = run.output, setting["root"] / f"cut-{grouped}"
    if not grouped:
        config = config_of(setting, "shuffled", data__group_by_length=False)
        assert run_ranks(train_all, 2, [config]) == [None, None]
        whole = Path(config.output_dir)
    last = max(run.metrics)
    for cut, ranks in ((0, 2), (2, 2), (4, 2)):
        if cut:
            for folder in (output / "checkpoints").glob("step-*"):
                if int(folder.name[-6:]) > cut:
                    shutil.rmtree(folder)
        config = config_of(
            setting, output.name, data__group_by_length=grouped, resume="auto" if cut else "none"
        )
        assert run_ranks(train_all, ranks, [config]) == [None] * ranks
    assert read_sample_log(output) == read_sample_log(whole)
    first, second = (load_trained(r / f"checkpoints/step-{last:06d}") for r in (whole, output))
    assert all((first[name] == second[name]).all() for name in first)
    before = sorted(path.stat().st_mtime_ns for path in output.rglob("*.safetensors"))
    config = config_of(setting, output.name, data__group_by_length=grouped, resume="auto")
    assert run_ranks(train_all, 2, [config]) == [None, None], "already finished"
    assert before == sorted(path.stat().st_mtime_ns for path in output.rglob("*.safetensors"))
    for folder in (output / "checkpoints").glob("step-*"):
        if int(folder.name[-6:]) > 3:
            shutil.rmtree(folder)
    config = config_of(
        setting,
        output.name,
        data__group_by_length=grouped,
        resume="auto",
        train={"epochs": 2, "micro_batch_size": 2, "global_batch_size": 8},
    )
    assert run_ranks(train_all, 4, [config]) == [None] * 4
    assert read_sample_log(output) == read_sample_log(whole)
