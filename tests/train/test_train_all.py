"""`model.trainable=all` leaves a whole Hugging Face model, though a router's gate may be frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemoe_ds.checkpoint.manifest import newest
from gemoe_ds.checkpoint.state import load_trained_weights
from gemoe_ds.config.load import config_from_dict
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.train.assemble import build_model
from gemoe_ds.train.run import HF_FOLDER
from tests.helpers import repository, run_ranks
from tests.train.resuming import make_config, train_all, write_setting

# Router and ZeRO stage: under 3 what is frozen is in parts too.
FROZEN = {
    "ada_k": ({"name": "ada_k", "warm_steps": 1}, 3),
    "evolve": ({"name": "evolve"}, 2),
    "frozen": ({"name": "evomoe", "gate": "frozen"}, 2),
    "none": ({"name": "evomoe", "gate": "none"}, 3),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("all")
    setting = write_setting(root)
    made = {
        name: make_config(
            setting,
            root / name,
            model__router=router,
            model__trainable="all",
            train={"steps": 2, "micro_batch_size": 1},
            parallel__ep_size=2,
            deepspeed=str(repository() / f"ds_configs/zero{zero}.json"),
        )
        for name, (router, zero) in FROZEN.items()
    }
    assert run_ranks(train_all, 2, list(made.values())) == [None, None]
    return made


@pytest.mark.parametrize("name", FROZEN)
def test_the_folder_is_the_run_s_model(runs, name):
    config = runs[name]
    output = Path(config.output_dir)
    model = build_model(config, ExpertShard())
    before = weights_of(model)
    load_trained_weights(model, newest(output))
    ours = weights_of(model)
    tree = config.model_dump(mode="json")
    tree["model"] |= {"checkpoint": str(output / HF_FOLDER), "router": {"name": "top_k"}}
    theirs = weights_of(build_model(config_from_dict(tree), ExpertShard()))
    assert ours.keys() == theirs.keys() == before.keys()
    for key, tensor in ours.items():
        assert torch.equal(theirs[key], tensor), key
        if key.endswith("gate.weight"):
            assert torch.equal(tensor, before[key]), "frozen"
    assert any(not torch.equal(tensor, before[key]) for key, tensor in ours.items())


def weights_of(model):
    return model.stock_tensors({n: p.detach().clone() for n, p in model.named_parameters()})
