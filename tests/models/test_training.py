"""Folders in the public layout, through the whole path: train, resume, evaluate, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from gemoe_ds.checkpoint.manifest import newest
from gemoe_ds.checkpoint.state import load_trained_weights
from gemoe_ds.cli.export import main as export
from gemoe_ds.config import load_config
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.moe.router import Router
from gemoe_ds.train.assemble import build_model
from tests.helpers import run_python, run_ranks
from tests.models.cases import CASES, write_case, write_text
from tests.train.resuming import losses, make_config, train_all, write_data

TOP_K = (Router.named("top_k"), Router.named("top_k").Config())


ALIKE = pytest.param("moe_llava_qwen", marks=pytest.mark.slow)  # but for its layout: moe_llava_*


@pytest.mark.parametrize("name", [n for n in CASES if n != "moe_llava_qwen"] + [ALIKE])
def test_trains_resumes_is_scored_and_exported(name, tmp_path):
    base, tokenizer = write_case(name, tmp_path)
    write_samples_of = write_data if CASES[name].sees else write_text
    data = write_samples_of(tmp_path / "data")
    setting = {"hf": base, "tokenizer": tokenizer, "data": data}
    changes = {
        "model__backbone": {"name": name},
        "train": {"steps": 3, "micro_batch_size": 1, "global_batch_size": 4},
        "checkpoint__every": 1,
        "data__max_length": 400,
    }
    whole = make_config(setting, tmp_path / "whole", **changes)
    assert run_ranks(train_all, 2, [whole]) == [None] * 2
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(newest(tmp_path / "cut"))
    rest = make_config(setting, tmp_path / "cut", parallel__ep_size=1, resume="auto", **changes)
    assert run_ranks(train_all, 1, [rest]) == [None]
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    command = ["launch/evaluate.py", tmp_path / "whole/config.yaml", "--out", tmp_path / "out"]
    done = run_python(*command, "--trained", tmp_path / "whole", "--data", setting["data"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < json.loads((tmp_path / "out/eval.json").read_text())["mean_k"] <= 3
    exported = tmp_path / "exported"
    config = tmp_path / "whole/config.yaml"
    export([str(config), "--trained", str(config.parent), "--out", str(exported)])
    is_the_trained_model(name, tmp_path / "whole", exported, tokenizer)


@pytest.fixture(scope="module")
def trained_whole(tmp_path_factory):
    """Every backbone after 2 steps of `trainable: all` on 2 ranks; one in a process group of its
    own would cost as much again."""
    root = tmp_path_factory.mktemp("all")
    configs = {}
    for name in CASES:
        base, tokenizer = write_case(name, root / name)
        data = (write_data if CASES[name].sees else write_text)(root / name / "data")
        setting = {"hf": base, "tokenizer": tokenizer, "data": data}
        backbone: dict = {"name": name}
        if name == "moe_llava_qwen":  # whose tower comes from elsewhere, and trains too
            backbone["vision_tower"] = str(move_tower_out(base, root / "clip"))
        configs[name] = make_config(
            setting,
            root / name / "run",
            model__backbone=backbone,
            model__trainable="all",
            train={"steps": 2, "micro_batch_size": 1, "global_batch_size": 2},
            optim__lr=1e-3,
            data__max_length=400,
        )
    assert run_ranks(train_all, 2, list(configs.values()), timeout=400) == [None] * 2
    return configs


def move_tower_out(base, folder):
    """A CLIP folder beside a MoE-LLaVA one that has its tower no more."""
    backbone = Backbone.named("moe_llava_qwen")
    model = MoEModel.from_checkpoint(backbone(backbone.Config()), base, base, TOP_K)
    model.hf.vision_tower.save_pretrained(folder)
    tensors = load_file(base / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if "image_tower" not in key}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", CASES)
def test_what_trained_everything_is_a_folder_of_the_same_kind(name, trained_whole):
    """The hf/ folder at the end of the run, read as a base, is the model of the checkpoint."""
    config = trained_whole[name]
    expected = build_model(config, ExpertShard())
    before = {n: p.detach().clone() for n, p in expected.named_parameters()}
    load_trained_weights(expected, newest(Path(config.output_dir)))
    folder = Path(config.output_dir) / "hf"
    backbone = Backbone.named(name)
    read = MoEModel.from_checkpoint(backbone(backbone.Config()), folder, folder, TOP_K, train="all")
    found = dict(read.named_parameters())
    own = expected.router_only_names()
    assert found.keys() == {n for n in before if n not in own}
    for n, parameter in expected.named_parameters():
        if n not in own:
            assert torch.equal(found[n], parameter), n
    assert sum(not torch.equal(found[n], before[n]) for n in found) > len(found) / 2


def is_the_trained_model(name, run, exported, tokenizer):
    """Its own code, where it has some, gives the logits and the k of the run; else our adapter
    reads it as a base with the trained gates."""
    config = load_config(run / "config.yaml", [])
    ours = build_model(config, ExpertShard()).eval()
    load_trained_weights(ours, newest(run))
    ids = torch.randint(6, 26, (2, 9), generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 5:] = False
    inputs = ModelInputs(ids, valid, torch.zeros_like(valid))
    ours.ctx.trace = True
    with torch.no_grad():
        expected = ours.backbone.head(ours.hf)(ours.hidden(inputs))[valid]
    if not (exported / "modeling_gemoe.py").exists():
        assert not hasattr(transformers, type(ours.hf).__name__)
        again = load_config(
            run / "config.yaml",
            [f"model.checkpoint={exported}", "model.router={name: top_k}"],
        )
        base = build_model(again, ExpertShard())
        for trained, read in zip(ours.moe_layers, base.moe_layers, strict=True):
            assert torch.equal(trained.router.gate.weight, read.router.gate.weight)
            assert torch.equal(trained.experts.down_EDF, read.experts.down_EDF)
        return
    auto = AutoModelForImageTextToText if CASES[name].sees else AutoModelForCausalLM
    theirs = auto.from_pretrained(exported, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=valid.long()).logits[valid]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for record, k_BS in zip(ours.ctx.layers, theirs.k_per_layer, strict=True):
        assert torch.equal(record.k_T, k_BS.flatten())
