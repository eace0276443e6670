"""Runs with `train.distill`: how micro-batches are cut does not matter, a resumed one goes on."""

from __future__ import annotations

import json
import shutil

import pytest

from gemoe_ds.errors import ConfigError
from tests.helpers import repository, run_ranks
from tests.train.resuming import CUT, losses, make_config, one_group, write_setting

STEPS = 5
DISTILL = {"tokens": "text", "weight": 0.8}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("distill"))


def config_of(setting, name: str, router: dict, micro: int, accumulation: int, **changes: object):
    train = {"steps": STEPS, "micro_batch_size": micro, "distill": DISTILL}
    train["gradient_accumulation_steps"] = accumulation
    options = {"model__router": router, "train": train, "optim__eps": 1e-3}
    return make_config(setting, setting["root"] / name, **options | changes)


def train_and_resume(rank: int, configs: list, resumed) -> None:
    """All of them, then the last once more from after step CUT."""
    import gemoe_ds.train.run as module
    from gemoe_ds.engine.world import gather_objects

    with one_group(module):
        for config in configs:
            module.train(config)
        if rank == 0:
            shutil.copytree(config.output_dir, resumed.output_dir)
            shutil.rmtree(f"{resumed.output_dir}/checkpoints/step-{STEPS:06d}")
        gather_objects(None)
        module.train(resumed)


def test_runs_with_a_teacher(setting):
    static = {"name": "top_k", "k": 2, "balance_weight": 0.0}
    ada_k = {"name": "ada_k", "warm_steps": 0}
    zero3 = {"deepspeed": str(repository() / "ds_configs/zero3.json")}
    configs = [
        config_of(setting, "at once", static, 2, 1),
        config_of(setting, "in parts", static, 1, 2, parallel__ep_size=1, **zero3),
        config_of(setting, "ada_k", ada_k, 1, 2),
    ]
    resumed = config_of(setting, "resumed", ada_k, 1, 2, resume="auto")
    run_ranks(train_and_resume, 2, configs, resumed)
    at_once, in_parts, whole, again = (
        losses(setting["root"] / name) for name in ("at once", "in parts", "ada_k", "resumed")
    )
    assert at_once == pytest.approx(in_parts, rel=1e-5)
    assert again == whole and len(whole) == STEPS > CUT
    lines = (setting["root"] / "at once/metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        total = 0.2 * line["loss/lm"] + 0.8 * line["loss/distill"]
        assert line["loss/total"] == pytest.approx(total, rel=1e-6)
        assert line["loss/distill"] > 1e-4


@pytest.mark.parametrize("trainable", ["experts", "all"])
def test_a_backbone_that_trains_is_no_teacher(setting, trainable):
    with pytest.raises(ConfigError, match=f"trainable={trainable} changes the teacher, which is"):
        make_config(setting, setting["root"], model__trainable=trainable, train__distill={})
    assert make_config(setting, setting["root"], train__distill={}).train.distill.weight == 0.5
