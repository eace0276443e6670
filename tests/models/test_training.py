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
from tests.helpers import run_ranks
from tests.models.cases import CASES, write_case, write_text
from tests.train.resuming import losses, make_config, train_all, write_data

TOP_K = (Router.named("top_k"), Router.named("top_k").Config())


ALIKE = pytest.param("moe_llava_qwen", marks=pytest.mark.slow)  # but for its layout: moe_llava_*


def write_setting_of(name: str, folder: Path) -> dict[str, Path]:
    base, tokenizer = write_case(name, folder)
    data = (write_data if CASES[name].sees else write_text)(folder / "data")
    return {"hf": base, "tokenizer": tokenizer, "data": data}


def evaluate_all(rank, commands):
    from launch import evaluate

    for arguments in commands:
        evaluate.main([str(word) for word in arguments])


def _is_scored(item: pytest.Item) -> bool:
    return "runs" in getattr(item, "fixturenames", ()) and item.path == Path(__file__)


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """By backbone its setting and its folder, with a run on two ranks (whole), one that was cut and
    went on on one rank (cut), and the scores of the first (out). A process group for each part."""
    asked = {i.callspec.params["name"] for i in request.session.items if _is_scored(i)}
    made, whole, rest, scored = {}, [], [], []
    for name in (name for name in CASES if name in asked):
        root = tmp_path_factory.mktemp(name)
        setting = write_setting_of(name, root)
        changes = {
            "model__backbone": {"name": name},
            "train": {"steps": 3, "micro_batch_size": 1, "global_batch_size": 4},
            "checkpoint__every": 1,
            "data__max_length": 400,
        }
        resumed = {"parallel__ep_size": 1, "resume": "auto"}
        whole.append(make_config(setting, root / "whole", **changes))
        rest.append(make_config(setting, root / "cut", **resumed, **changes))
        command = [root / "whole/config.yaml", "--trained", root / "whole"]
        scored.append([*command, "--data", setting["data"], "--out", root / "out"])
        made[name] = setting, root
    assert run_ranks(train_all, 2, whole, timeout=280) == [None] * 2
    for _, root in made.values():
        shutil.copytree(root / "whole", root / "cut")
        shutil.rmtree(newest(root / "cut"))
    assert run_ranks(train_all, 1, rest, timeout=200) == [None]
    run_ranks(evaluate_all, 1, scored, timeout=200)
    return made


@pytest.mark.parametrize("name", [n for n in CASES if n != "moe_llava_qwen"] + [ALIKE])
def test_trains_resumes_is_scored_and_exported(name, runs, tmp_path):
    setting, root = runs[name]
    assert losses(root / "cut") == pytest.approx(losses(root / "whole"), rel=1e-5)
    assert 0 < json.loads((root / "out/eval.json").read_text())["mean_k"] <= 3
    config = root / "whole/config.yaml"
    export([str(config), "--trained", str(config.parent), "--out", str(tmp_path / "exported")])
    is_the_trained_model(name, root / "whole", tmp_path / "exported")


@pytest.fixture(scope="module")
def trained_whole(tmp_path_factory):
    """Every backbone after 2 steps of `trainable: all` on 2 ranks; one in a process group of its
    own would cost as much again."""
    root = tmp_path_factory.mktemp("all")
    configs = {}
    for name in CASES:
        setting = write_setting_of(name, root / name)
        backbone: dict = {"name": name}
        if name == "moe_llava_qwen":  # whose tower comes from elsewhere, and trains too
            backbone["vision_tower"] = str(move_tower_out(setting["hf"], root / "clip"))
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


def is_the_trained_model(name, run, exported):
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
