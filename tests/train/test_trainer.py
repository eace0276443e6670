"""What a run reports of its steps, against values worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from gemoe_ds.data.sample import open_samples
from gemoe_ds.files import whole_lines
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.train.assemble import build_collator, build_model
from gemoe_ds.train.trainer import micro_batch_seed
from tests.helpers import run_ranks
from tests.train.resuming import make_config, one_group, train_all, write_setting

LR, PREDICTOR_LR = 3e-4, 2e-2
COSINE = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("trainer"))


def config_of(setting, name: str, **changes: object):
    options = {
        "optim": {"lr": LR, "predictor_lr": PREDICTOR_LR},
        "train": {"steps": 4, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
        "model__router": {"name": "gemoe", "k_low": 0, "k_high": 6},
        "monitor__sample_log": True,
    }
    return make_config(setting, setting["root"] / name, **options | changes)


def metrics(config) -> list[dict]:
    return [json.loads(line) for line in whole_lines(Path(config.output_dir) / "metrics.jsonl")]


@pytest.fixture(scope="module")
def report(setting):
    """Of the first of four steps on two ranks, with ragged micro-batches; and the recipe."""
    config = config_of(setting, "two ranks")
    assert run_ranks(train_all, 2, [config]) == [None, None]
    return config, metrics(config)


def micro_batches(config) -> list[list[str]]:
    """Ids of the samples of the first step, as the ranks' sample logs have them."""
    folder = Path(config.output_dir) / "sample_log"
    lines = [json.loads(x) for path in sorted(folder.iterdir()) for x in whole_lines(path)]
    return [line["ids"] for line in lines if line["step"] == 1]


def encoded_samples(config, model):
    samples, collator = open_samples(config.data.train_path), build_collator(config, model)
    rows = [samples[row] for row in range(len(samples))]
    return collator, {s.id: collator.encode(row, s) for row, s in enumerate(rows)}


def test_routing_and_loss_are_those_of_the_samples_one_by_one(report):
    """Each alone, without any padding, through the model as it was before the first step."""
    config, (first, *_) = report
    model = build_model(config, ExpertShard()).train()
    model.ctx.trace = True
    collator, encoded = encoded_samples(config, model)
    ids = [i for some in micro_batches(config) for i in some]
    assert len(ids) == 8 and len({len(encoded[i].input_ids) for i in ids}) > 1, "there is padding"
    loss, targets, k_LT, chosen_LE, entropy_LT = 0.0, 0, [], 0, []
    for i in ids:
        batch = collator.batch([encoded[i]])
        with torch.no_grad():
            loss += model(**batch.inputs, targets_per_micro_batch=1.0)["lm"].item()
        targets += batch.num_targets
        records = model.ctx.layers
        k_LT.append(torch.stack([record.k_T for record in records]))
        entropy_LT.append(torch.stack([record.entropy_T for record in records]))
        with torch.no_grad():
            ranks = [r.logits_TE.argsort(1, descending=True).argsort(1) for r in records]
        chosen = [(r < k[:, None]).sum(0) for r, k in zip(ranks, k_LT[-1], strict=True)]
        chosen_LE = chosen_LE + torch.stack(chosen)
    k_LT, entropy_LT = torch.cat(k_LT, 1).double(), torch.cat(entropy_LT, 1)
    mean_k_L = k_LT.mean(1)
    assert (mean_k_L[0] - mean_k_L[1]).abs() > 0.05, "else one layer stands for both"
    assert first["loss/lm"] == pytest.approx(loss / targets, rel=1e-5)
    assert first["mean_k"] == pytest.approx(mean_k_L.mean().item(), rel=1e-9)
    for layer in range(2):
        name, load_E = f"layer_{layer:02d}", chosen_LE[layer].double()
        assert first[f"mean_k/{name}"] == pytest.approx(mean_k_L[layer].item(), rel=1e-9)
        assert first[f"entropy_bits/{name}"] == pytest.approx(entropy_LT[layer].mean().item())
        most = (load_E.max() / load_E.mean()).item()
        assert most > 1.05 and first[f"load_max_over_mean/{name}"] == pytest.approx(most)
        assert first[f"idle_experts/{name}"] == (load_E == 0).sum()
        counts = [first[f"k_histogram_{kind}/{name}"] for kind in ("image", "text")]
        expected = torch.bincount(k_LT[layer].long(), minlength=7)
        assert torch.equal(torch.tensor(counts).sum(0).long(), expected)


def test_the_total_and_the_norm_are_those_of_the_global_batch(report):
    """Every target of it weighs the same; auxiliary losses are means over micro-batches."""
    config, (first, *_) = report
    model = build_model(config, ExpertShard()).train()
    collator, encoded = encoded_samples(config, model)
    batches = [collator.batch([encoded[i] for i in ids]) for ids in micro_batches(config)]
    assert len(batches) == 4
    targets = sum(batch.num_targets for batch in batches)
    total = 0.0
    for batch in batches:
        parts = model(**batch.inputs, targets_per_micro_batch=targets / 4)
        (parts["loss"] / 4).backward()
        total += parts["loss"].item() / 4
    norm = torch.stack([p.grad.norm() for p in model.trainable().values()]).norm().item()
    assert first["loss/total"] == pytest.approx(total, rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_step_is_logged_with_the_rates_that_it_used(report):
    _, lines = report
    assert [line["lr/router"] for line in lines] == pytest.approx([LR * f for f in COSINE])
    expected = [PREDICTOR_LR * factor for factor in COSINE]
    assert [line["lr/predictor"] for line in lines] == pytest.approx(expected)


SKIPPED_UPDATE = 2  # counted from 0


def train_with_a_skip(module, config, patch) -> list[float]:
    """One update's gradient is not finite; the predictor's rate in every update."""
    from gemoe_ds.engine.optimizer import GlobalNormAdamW

    step, updates = GlobalNormAdamW.step, []

    def spoiled(self, closure=None):
        if len(updates) == SKIPPED_UPDATE:
            self.param_groups[0]["params"][0].grad.fill_(float("nan"))
        updates.append(self.param_groups[0]["lr"])
        step(self, closure)

    patch.setattr(GlobalNormAdamW, "step", spoiled)
    module.train(config)
    return updates


@pytest.mark.parametrize("updates", [1, 2])
def test_a_skipped_update_moves_no_rate(alone, updates):
    """The schedule counts what was not skipped; of several updates of a step the last is logged."""
    config, used = alone[f"skip {updates}"]
    lines = metrics(config)
    steps = {1: [0, 1, 2, 2], 2: [0, 1, 2, 3]}[updates]  # of the schedule
    expected = [PREDICTOR_LR * COSINE[step] for step in steps]
    assert [line["lr/predictor"] for line in lines] == pytest.approx(expected)
    assert [line["lr/predictor"] for line in lines] == used[updates - 1 :: updates]
    skipped_in = SKIPPED_UPDATE // updates
    counts = [int(step >= skipped_in) for step in range(4)]
    assert [line["skipped_steps"] for line in lines] == counts
    if updates == 1:
        assert not math.isfinite(lines[skipped_in]["grad_norm"]), "not that of the step before"


def train_by_a_clock(module, config, patch) -> list[int]:
    """Every step takes a second, the first one ten; a checkpoint takes a hundred. Returns the
    random state of every forward pass."""
    from gemoe_ds.train import saving, trainer

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock, train_step, save = Clock(), trainer.Trainer.train_step, saving.Saving._save
    seeds: list[int] = []

    def timed_step(self, step, batches, *, collect):
        clock.now += 10 if step == 1 else 1
        if step == 1:
            self.model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
        return train_step(self, step, batches, collect=collect)

    def timed_save(self, trainer, **options):
        clock.now += 100
        save(self, trainer, **options)

    patch.setattr(trainer, "time", clock)
    patch.setattr(saving, "time", clock)
    patch.setattr(trainer.Trainer, "train_step", timed_step)
    patch.setattr(saving.Saving, "_save", timed_save)
    module.train(config)
    return seeds


def train_each(rank: int, configs: dict) -> dict[str, list]:
    """Every run with what goes wrong in it, or is measured, in one process group."""
    import gemoe_ds.train.run as module

    found = {}
    with one_group(module):
        for name, config in configs.items():
            with pytest.MonkeyPatch.context() as patch:
                train = train_by_a_clock if name == "clock" else train_with_a_skip
                found[name] = train(module, config, patch)
    return found


@pytest.fixture(scope="module")
def alone(setting):
    """By name the recipe of a run on one rank, and what was seen in it."""
    clock = {"train__steps": 5, "checkpoint__every": 1, "monitor__every": 2}
    configs = {"clock": config_of(setting, "clock", parallel__ep_size=1, **clock)}
    for updates in (1, 2):
        name, router = f"skip {updates}", {"name": "ada_k", "updates": updates, "warm_steps": 0}
        one = {"parallel__ep_size": 1, "deepspeed": "ds_configs/zero0.json"}
        configs[name] = config_of(setting, name, model__router=router, **one)
    (found,) = run_ranks(train_each, 1, configs)
    return {name: (config, found[name]) for name, config in configs.items()}


def test_throughput_is_that_of_training(alone):
    """Without the step that warms up and without saving, which is a number of its own."""
    config, seeds = alone["clock"]
    assert seeds == [micro_batch_seed(config.seed, block) for block in range(5 * 2)]
    _, encoded = encoded_samples(config, build_model(config, ExpertShard()))
    tokens = dict.fromkeys(range(1, 6), 0)
    for line in whole_lines(Path(config.output_dir) / "sample_log/rank-00000.jsonl"):
        entry = json.loads(line)
        tokens[entry["step"]] += sum(len(encoded[i].input_ids) for i in entry["ids"])
    lines = metrics(config)
    assert [line["step"] for line in lines] == [2, 4, 5]
    rates = [line["throughput/tokens_per_second"] for line in lines]
    assert rates == [tokens[2], (tokens[3] + tokens[4]) / 2, tokens[5]]
    assert [line["throughput/seconds"] for line in lines] == [11, 2, 1]
    stalls = [line["throughput/checkpoint_stall_seconds"] for line in lines]
    assert stalls == [100, 300, 400], "of the checkpoints before"
