"""A dense LLaVA becomes a MoE one: same outputs at the start, its own after training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from gemoe_ds.checkpoint.state import load_trained
from gemoe_ds.cli.export import main as export
from gemoe_ds.config.load import config_from_dict
from gemoe_ds.errors import CheckpointError, ConfigError
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_model import ExpertShard, MoEModel
from gemoe_ds.models.upcycled.model import UpcycledLlavaForConditionalGeneration
from gemoe_ds.moe.router import Router
from gemoe_ds.train.assemble import build_model
from tests.helpers import repository, run_python, run_ranks
from tests.tiny import WORDS, model_inputs, random_batch, write_tokenizer
from tests.train.resuming import BOUND, losses, train_all, write_data

LAYERS = 4


def write_dense(folder: Path, **text: object) -> Path:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    options = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**options | text),
        image_token_id=3,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense")
    return {
        "dense": write_dense(root / "dense"),
        "tokenizer": write_tokenizer(root / "tokenizer"),
        "data": write_data(root / "data"),
        "root": root,
    }


def load(setting, checkpoint="dense", router="top_k", train="experts", **options):
    backbone = Backbone.named("upcycled")
    chosen = Router.named(router)
    torch.manual_seed(0)
    return MoEModel.from_checkpoint(
        backbone(backbone.Config(**options)),
        setting[checkpoint] if isinstance(checkpoint, str) else checkpoint,
        setting["tokenizer"],
        (chosen, chosen.Config()),
        train=train,
    )


def dense_logits(setting, batch):
    model = LlavaForConditionalGeneration.from_pretrained(setting["dense"], dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(
            batch["input_ids_BS"],
            pixel_values=batch["images"]["pixels"],
            attention_mask=batch["is_valid_BS"].long(),
        ).logits


def logits_of(model, batch):
    with torch.no_grad():
        return model.backbone.head(model.hf)(model.eval().hidden(model_inputs(batch)))


@pytest.mark.parametrize("top_k", [2, 4])
def test_copies_with_weights_that_sum_to_one_are_the_dense_model(setting, top_k):
    batch = random_batch(3)
    model = load(setting, top_k=top_k)
    assert [block for block in model.block_paths if "layers.0" in block or "layers.2" in block]
    assert len(model.moe_layers) == LAYERS // 2, "every other layer"
    valid = batch["is_valid_BS"]
    torch.testing.assert_close(
        logits_of(model, batch)[valid], dense_logits(setting, batch)[valid], rtol=0, atol=1e-5
    )


def test_own_plain_forward_equals_ours(setting):
    """The model class on its own, with gates and experts that differ, against the MoE layers."""
    batch = random_batch(4)
    torch.manual_seed(1)
    model = load(setting)
    plain = model.backbone.load(setting["dense"], setting["tokenizer"]).eval()
    state = {n: torch.randn_like(p) * 0.3 for n, p in model.trainable().items()}
    for name, parameter in model.trainable().items():
        parameter.data.copy_(state[name])
    for name, tensor in model.stock_tensors(state).items():
        plain.get_parameter(name).data.copy_(tensor)
    with torch.no_grad():
        expected = plain(
            batch["input_ids_BS"],
            pixel_values=batch["images"]["pixels"],
            attention_mask=batch["is_valid_BS"].long(),
        ).logits
    valid = batch["is_valid_BS"]
    torch.testing.assert_close(logits_of(model, batch)[valid], expected[valid], rtol=0, atol=1e-5)


def make_config(setting, output: Path, router: dict, ep_size: int, zero: int, **model: object):
    return config_from_dict(
        {
            "output_dir": str(output),
            "model": {
                "backbone": {"name": "upcycled"},
                "checkpoint": str(setting["dense"]),
                "router": router,
                "trainable": "experts",
                "dtype": "float32",
            }
            | model,
            "data": {"train_path": str(setting["data"]), "tokenizer": str(setting["tokenizer"])},
            "optim": {"lr": 2e-3, "eps": 1e-3},
            "parallel": {"ep_size": ep_size},
            "train": {"steps": 4, "micro_batch_size": 1, "global_batch_size": 4},
            "monitor": {"every": 1, "tensorboard": False},
            "deepspeed": str(repository() / f"ds_configs/zero{zero}.json"),
        }
    )


@pytest.mark.parametrize("router", ["ltdr", "dynmoe"])
def test_trainable_experts_over_ranks_equal_one_process(setting, tmp_path, router):
    """MoE-LLaVA's third stage, as LTDR and DynMoE use it."""
    options = {"name": router}
    runs = {
        "alone": make_config(setting, tmp_path / "alone", options, 1, 0),
        "shared": make_config(setting, tmp_path / "shared", options, 2, 2),
        "zero3": make_config(setting, tmp_path / "zero3", options, 2, 3),
    }
    assert run_ranks(train_all, 1, [runs["alone"]]) == [None]
    assert run_ranks(train_all, 2, [runs["shared"], runs["zero3"]]) == [None, None]
    expected = losses(tmp_path / "alone")
    for way in ("shared", "zero3"):
        for step, loss in losses(tmp_path / way).items():
            assert loss == pytest.approx(expected[step], rel=BOUND), (way, step)
    stored = load_trained(tmp_path / "shared/checkpoints/step-000004")
    kinds = {name.rsplit(".", 1)[1] for name in stored if ".experts." in name}
    assert kinds == {"gate_up_EGD", "down_EDF"}


def test_evolved_then_routed(setting, tmp_path):
    """EvoMoE: stage II, export, and stage III on what came out, which is no longer all copies."""
    evolve = make_config(setting, tmp_path / "evolve", {"name": "evolve"}, 1, 2)
    assert run_ranks(train_all, 2, [evolve]) == [None, None]
    command = ["launch/export.py", tmp_path / "evolve/config.yaml"]
    command += ["--trained", tmp_path / "evolve", "--out", tmp_path / "hf"]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "hf/config.json").read_text())["upcycled"]["num_experts"] == 4

    model = load(setting, tmp_path / "hf", router="evomoe", train="routers")
    stored = load_trained(tmp_path / "evolve/checkpoints/step-000004")
    dense = load(setting)
    for layer, plain in zip(model.moe_layers, dense.moe_layers, strict=True):
        start, now = plain.experts.gate_up_EGD[0], layer.experts.gate_up_EGD
        steps = [(now[e] - start).norm() for e in range(4)]
        assert steps[0] > steps[3] > steps[2] > steps[1] > 0, "further, the smaller its beta"
    name = next(n for n in stored if n.endswith("gate_up_EGD"))
    assert torch.equal(model.moe_layers[0].experts.gate_up_EGD, stored[name])

    routed = make_config(
        setting,
        tmp_path / "routed",
        {"name": "evomoe", "k": 1},
        2,
        2,
        checkpoint=str(tmp_path / "hf"),
        train="routers",
    )
    assert run_ranks(train_all, 2, [routed]) == [None, None]


def test_a_frozen_gate_is_exported_as_the_run_had_it(setting, tmp_path):
    """The dense base has none: it was drawn, and is in the checkpoint though it does not train."""
    routers = {"ada_k": {"name": "ada_k"}, "evomoe": {"name": "evomoe", "gate": "frozen"}}
    runs = {n: make_config(setting, tmp_path / n, router, 1, 0) for n, router in routers.items()}
    assert run_ranks(train_all, 1, list(runs.values())) == [None]
    for name, config in runs.items():
        run, out = tmp_path / name, tmp_path / f"{name}-hf"
        recipe = [str(run / "config.yaml"), "seed=5"]
        export([*recipe, "--trained", str(run), "--out", str(out)])
        model, exported = build_model(config, ExpertShard()), load(setting, out)
        for ours, theirs in zip(model.moe_layers, exported.moe_layers, strict=True):
            assert torch.equal(ours.router.gate.weight, theirs.router.gate.weight), name


@pytest.mark.parametrize("train", ["routers", "experts"])
def test_what_is_drawn_depends_on_the_seed_alone(setting, tmp_path, train):
    """Not on the shard, the dtype, or what the process has drawn before."""
    router = {"name": "gemoe", "monotonic_weight": 0, "k_high": 4}
    drawn = []
    for seed, ranks, dtype in ((0, 1, "float32"), (0, 2, "bfloat16"), (1, 1, "float32")):
        torch.rand(7)
        config = make_config(setting, tmp_path, router, 1, 0, train=train, dtype=dtype)
        model = build_model(config.model_copy(update={"seed": seed}), ExpertShard(ranks - 1, ranks))
        drawn.append([t for layer in model.moe_layers for t in layer.router.parameters()])
    first, sharded, other = drawn
    assert all(torch.equal(a, b) for a, b in zip(first, sharded, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_exported_model_runs_without_this_package(setting, tmp_path):
    config = make_config(setting, tmp_path / "run", {"name": "ltdr"}, 1, 0)
    assert run_ranks(train_all, 1, [config]) == [None]
    command = ["launch/export.py", tmp_path / "run/config.yaml"]
    command += ["--trained", tmp_path / "run", "--out", tmp_path / "hf"]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    code = (
        "import sys, torch; sys.modules['gemoe_ds'] = None\n"
        "from transformers import AutoModelForImageTextToText as Auto\n"
        f"m = Auto.from_pretrained({str(tmp_path / 'hf')!r}, trust_remote_code=True).eval()\n"
        "ids = torch.tensor([[1, 3, 3, 3, 3, 7, 8]])\n"
        "m(ids, pixel_values=torch.randn(1, 3, 16, 16))\n"
        "print([sorted(set(k.flatten().tolist())) for k in m.k_per_layer])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("]]")


def test_needs_a_dense_model(setting):
    with pytest.raises(ConfigError, match="starts from a dense model"):
        load(setting, None)
    with pytest.raises(ConfigError, match=r"first=9: .* has 4 layers"):
        load(setting, first=9)
    with pytest.raises(ConfigError, match="top_k=5 exceeds num_experts=4"):
        load(setting, top_k=5)


def test_other_ffns_are_refused(setting, tmp_path):
    folder = write_dense(tmp_path / "biased", mlp_bias=True)
    with pytest.raises(CheckpointError, match="SwiGLU FFNs without biases"):
        load(setting | {"biased": folder}, "biased")


def test_an_upcycled_folder_brings_its_own_shape(setting, tmp_path):
    model = UpcycledLlavaForConditionalGeneration.from_dense(
        LlavaForConditionalGeneration.from_pretrained(setting["dense"], dtype=torch.float32),
        {"layers": [1], "num_experts": 3, "top_k": 1, "norm_topk_prob": False},
    )
    model.save_pretrained(tmp_path / "up")
    loaded = load(setting, tmp_path / "up")
    assert [spec.num_experts for spec in loaded.routing] == [3]
    with pytest.raises(ConfigError, match=r"num_experts=4, but .* is upcycled already, with 3"):
        load(setting, tmp_path / "up", num_experts=4)
