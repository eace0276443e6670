"""`model.experts_dtype`: read into few bits, and a run that equals one on the dequantised model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from gemoe_ds.config.load import config_from_dict
from gemoe_ds.config.schema import OptimConfig
from gemoe_ds.data.sample import open_samples
from gemoe_ds.engine import host_memory
from gemoe_ds.engine.build import group_summary
from gemoe_ds.engine.groups import expert_shard
from gemoe_ds.engine.read_once import ReadOnce
from gemoe_ds.engine.world import distributed
from gemoe_ds.errors import ConfigError
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.quantised_linear import QuantisedLinear
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.moe.experts.module import QuantisedExperts
from gemoe_ds.moe.experts.quantised import QuantisedWeight
from gemoe_ds.moe.router import Router
from gemoe_ds.train.assemble import build_model
from gemoe_ds.train.checks.base_loss_check import _vocabulary
from gemoe_ds.train.estimate import estimate
from tests.helpers import repository, run_ranks
from tests.models.cases import write_case
from tests.train.resuming import losses, make_config, train_all, write_setting


def load(name: str, folder: Path, experts_dtype: str | None, **options) -> MoEModel:
    backbone = Backbone.named(name)
    torch.manual_seed(0)
    return MoEModel.from_checkpoint(
        backbone(backbone.Config()),
        folder / "base",
        folder / "tokenizer",
        (Router.named("gemoe"), Router.named("gemoe").Config()),
        dtype=torch.float32,
        experts_dtype=experts_dtype,
        **options,
    )


def check_quantised(model: MoEModel, plain: MoEModel, experts_dtype: str) -> None:
    for layer, exact in zip(model.moe_layers, plain.moe_layers, strict=True):
        assert isinstance(layer.experts, QuantisedExperts)
        for name in ("gate_up_EGD", "down_EDF"):
            found, tensor = getattr(layer.experts, name), getattr(exact.experts, name)
            if experts_dtype == "float8":  # whose blocks are those of the stored matrices
                for expert, weight in enumerate(tensor):
                    error = (found.dequantised(expert, torch.float32) - weight).abs()
                    assert (error <= weight.abs() * 2.0**-4 + weight.abs().max() * 2.0**-15).all()
                continue
            wanted = QuantisedWeight.of(experts_dtype, tensor)
            assert torch.equal(found.codes_EMC, wanted.codes_EMC), name
            assert torch.equal(found.scales_EMB, wanted.scales_EMB), name
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "name, experts_dtype, rank, ep_size",
    [
        ("olmoe", "int8", 0, 1),
        ("qwen3_vl_moe", "nf4", 1, 2),
        ("deepseek_vl2", "float8", 0, 2),
        ("molmoe", "nf4", 1, 2),
        ("moe_llava_qwen", "int8", 1, 2),
    ],
)
def test_a_folder_is_quantised_while_it_is_read(tmp_path, name, experts_dtype, rank, ep_size):
    """As the model's own experts would be: all or a shard, in whatever layout they are stored."""
    write_case(name, tmp_path)
    shard = ExpertShard(rank, ep_size)
    model, plain = (load(name, tmp_path, one, shard=shard) for one in (experts_dtype, None))
    check_quantised(model, plain, experts_dtype)
    said = [group_summary(one, OptimConfig(lr=0.1)).splitlines()[-1] for one in (model, plain)]
    assert said[0].endswith(f" parameters in float32 and {experts_dtype}")
    assert said[1].endswith(" parameters in float32")


def read_by_one(rank: int, folder: str) -> None:
    host_memory._this_host = lambda: "aabb"[rank]
    with distributed() as world:
        memory = ReadOnce(host_memory.HostMemory.of(world).ranks, world)
        shard = expert_shard(2, world)
        model = load("olmoe", Path(folder), "nf4", shard=shard, memory=memory)
        check_quantised(model, load("olmoe", Path(folder), None, shard=shard), "nf4")


def test_what_one_rank_reads_all_quantise_alike(tmp_path):
    write_case("olmoe", tmp_path)
    assert run_ranks(read_by_one, 4, str(tmp_path)) == [None] * 4


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("quantised"))


def twin(setting, experts_dtype: str, dense_dtype: str | None) -> Path:
    """The base dequantised, in float32."""
    out = setting["root"] / f"twin-{experts_dtype}-{dense_dtype}"
    if not out.exists():
        config = run_config(setting, "twin", experts_dtype, model__dense_dtype=dense_dtype)
        model = build_model(config, ExpertShard())
        maps = {
            f"{path}.weight": module.weight
            for path, module in model.named_modules()
            if isinstance(module, QuantisedLinear)
        }
        assert bool(maps) == (dense_dtype is not None)
        experts = {
            f"{path}.{stock}": torch.stack(
                [weight.dequantised(e, torch.float32) for e in range(weight.shape[0])]
            )
            for path, names, layer in zip(
                model.block_paths, model.expert_names, model.moe_layers, strict=True
            )
            for stock, weight in zip(
                names[:2], (layer.experts.gate_up_EGD, layer.experts.down_EDF), strict=True
            )
        }
        weights = experts | dict(model.stock_tensors(maps))
        model.backbone.save_trained(model.hf, weights, setting["hf"], out)
    return out


def run_config(setting, name: str, experts_dtype: str | None, *, zero: int = 2, ep_size=1, **more):
    options = {
        "model__experts_dtype": experts_dtype,
        "parallel__ep_size": ep_size,
        "train": {"steps": 4, "micro_batch_size": 1, "global_batch_size": 4},
        "checkpoint": {"every": 2, "keep": 9},
        "optim__eps": 1e-3,
        "deepspeed": str(repository() / f"ds_configs/zero{zero}.json"),
    }
    return make_config(setting, setting["root"] / name, **options | more)


RUNS = [  # format of experts, of the rest, ranks, EP size, ZeRO stage, recomputation
    ("int8", None, 1, 1, 0, False),
    ("nf4", "int8", 2, 2, 2, True),
    ("float8", "float8", 2, 2, 3, False),
    ("nf4", None, 2, 1, 1, False),
]


@pytest.fixture(scope="module")
def runs(setting):
    """Each run, and one rank on the dequantised model."""
    by_ranks: dict[int, list] = {1: [], 2: []}
    for experts_dtype, dense_dtype, ranks, ep_size, zero, recompute in RUNS:
        name = f"{experts_dtype}-{ranks}-{ep_size}-{zero}"
        options = {"zero": zero, "ep_size": ep_size, "model__activation_checkpointing": recompute}
        options["model__dense_dtype"] = dense_dtype
        by_ranks[ranks].append(run_config(setting, name, experts_dtype, **options))
    for formats in {run[:2] for run in RUNS}:
        base, name = str(twin(setting, *formats)), f"whole-{formats[0]}-{formats[1]}"
        by_ranks[1].append(run_config(setting, name, None, model__checkpoint=base))
    for ranks, configs in by_ranks.items():
        assert run_ranks(train_all, ranks, configs, timeout=300) == [None] * ranks
    return setting["root"]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_run_equals_that_of_the_dequantised_model(runs, run):
    experts_dtype, dense_dtype, ranks, ep_size, zero, _ = run
    expected = losses(runs / f"whole-{experts_dtype}-{dense_dtype}")
    found = losses(runs / f"{experts_dtype}-{ranks}-{ep_size}-{zero}")
    assert found.keys() == expected.keys() == {1, 2, 3, 4}
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_run_goes_on_in_another_precision_and_says_so(setting, runs):
    config = run_config(setting, "int8-1-1-0", "nf4", zero=0, resume="auto", train__steps=6)
    assert run_ranks(train_all, 1, [config]) == [None]
    for file, there in (("config-until-step-000004.yaml", "int8"), ("config.yaml", "nf4")):
        recipe = yaml.safe_load((runs / "int8-1-1-0" / file).read_text())
        assert recipe["model"]["experts_dtype"] == there
    assert losses(runs / "int8-1-1-0").keys() == set(range(1, 7))
    manifest = json.loads((runs / "int8-1-1-0/checkpoints/step-000006/manifest.json").read_text())
    assert not any("experts" in key.split(".") for key in manifest["tensors"]), "routers alone"


def test_a_quantised_head_has_its_vocabulary(setting):
    model = build_model(
        run_config(setting, "head", "nf4", model__dense_dtype="int8"), ExpertShard()
    )
    head = model.backbone.head(model.hf)
    assert isinstance(head, QuantisedLinear)
    assert _vocabulary(model) == head.out_features == model.hf.config.text_config.vocab_size


def test_the_estimate_counts_the_bits(setting):
    config = run_config(setting, "estimated", "nf4", model__dense_dtype="int8")
    model = build_model(config, ExpertShard())
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    in_few = [module for module in model.modules() if isinstance(module, QuantisedWeight)]
    few_bits = sum(one.codes_EMC.nbytes + one.scales_EMB.nbytes for one in in_few)
    gates = sum(layer.base.gate.weight.nbytes for layer in model.moe_layers)
    found = estimate(config, open_samples(setting["data"]), 1, torch.device("cpu"))
    assert found.parts["frozen weights"] == frozen + few_bits + gates
    plain = estimate(
        run_config(setting, "estimated", None),
        open_samples(setting["data"]),
        1,
        torch.device("cpu"),
    )
    assert found.common < plain.common and found.total < plain.total


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"trainable": "all"}, "experts in few bits cannot train; set it to null"),
        ({"pack_experts": True}, "packed experts are two more copies"),
        ({"experts_dtype": "int4"}, "experts_dtype"),
        (
            {"experts_dtype": None, "trainable": "all", "dense_dtype": "int8"},
            "few bits cannot train",
        ),
        ({"dense_dtype": "int8", "compile": "dense"}, "does not see into weights in few bits"),
    ],
)
def test_what_cannot_be(changes, words):
    tree = make_config(dict.fromkeys(("hf", "data", "tokenizer"), "x"), "out").model_dump(
        mode="json"
    )
    tree["model"] |= {"experts_dtype": "nf4"} | changes
    with pytest.raises(ConfigError, match=words):
        config_from_dict(tree)
