"""A model that knows its texts, and the same with gate and up exchanged: a dry run tells."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OlmoeForCausalLM

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.data.sample import open_samples
from gemoe_ds.errors import DataError, GemoeError
from gemoe_ds.models.backbone import Backbone, Golden
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.moe.context import Stat
from gemoe_ds.train import trainer
from gemoe_ds.train.assemble import build_collator, build_model
from gemoe_ds.train.checks.base_loss_check import gate_and_up_exchanged, unmodified
from gemoe_ds.train.monitor import StatSum
from tests.helpers import run_python, run_ranks
from tests.models.cases import write_case, write_text
from tests.train.resuming import make_config


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """OLMoE that has learned its few texts by heart, as stored by transformers."""
    root = tmp_path_factory.mktemp("learned")
    base, tokenizer = write_case("olmoe", root)
    setting = {"hf": base, "tokenizer": tokenizer, "data": write_text(root / "data")}
    config = config_of(setting, root, model__router={"name": "top_k"}, model__trainable="all")
    model, samples = build_model(config, ExpertShard()), open_samples(setting["data"])
    collator = build_collator(config, model)
    inputs = collator.batch([collator.encode(row, samples[row]) for row in range(3)]).inputs
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(**inputs)["loss"].backward()
        optimizer.step()
    tensors = model.stock_tensors({n: p.detach() for n, p in model.named_parameters()})
    model.backbone.save_trained(model.hf, tensors, base, root / "learned")
    return setting | {"hf": root / "learned", "random": base, "root": root}


def config_of(setting, root, **changes):
    return make_config(
        setting,
        root / "run",
        **{"model__backbone": {"name": "olmoe"}, "parallel__ep_size": 1} | changes,
    )


def exchanged(folder, out):
    """A folder whose gate and up projections stand under each other's names."""
    shutil.copytree(folder, out)
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    for file in out.glob("*.safetensors"):
        tensors = {}
        for key, tensor in load_file(file).items():
            for name, instead in other.items():
                if f".{name}." in key:
                    key = key.replace(name, instead)
                    break
            tensors[key] = tensor
        save_file(tensors, file, metadata={"format": "pt"})
    (out / "model.safetensors.index.json").unlink()
    whole = {}
    for file in out.glob("*.safetensors"):
        whole |= load_file(file)
        file.unlink()
    save_file(whole, out / "model.safetensors", metadata={"format": "pt"})
    return out


def look(rank: int, configs: list) -> list:
    """What a dry run says of each."""
    from gemoe_ds.engine.groups import expert_shard
    from gemoe_ds.engine.world import distributed
    from gemoe_ds.train.checks.base_loss_check import base_loss_check

    found = []
    with distributed() as world:
        for config in configs:
            shard = expert_shard(config.ep_size, world)
            samples = open_samples(config.data.train_path)
            try:
                model = build_model(config, shard)
                found.append(list(base_loss_check(model, config, samples, world)))
            except GemoeError as error:
                found.append(str(error))
    return found


def test_what_is_said_of_good_random_and_exchanged_weights(setting, tmp_path):
    wrong = exchanged(setting["hf"], tmp_path / "wrong")
    folders = (setting["hf"], setting["random"], wrong)
    configs = [config_of(setting, tmp_path, model__checkpoint=str(f)) for f in folders]
    configs.append(config_of(setting, tmp_path, parallel__ep_size=2))
    (alone,) = run_ranks(look, 1, configs[:3])
    two = run_ranks(look, 2, configs[3:])
    good, random, refused = alone
    assert "k = 3: loss 0." in good[0] and good[0].endswith("it knows these texts")
    assert good[1].endswith("they are in their places")
    assert "differs: little better than guessing" in random[0]
    assert random[1].endswith("too close to tell")
    assert refused.startswith(f"model.checkpoint={wrong}: gate and up projections stand under")
    assert two == [[good], [good]]


def test_nothing_is_left_behind(setting, tmp_path):
    """The routers and experts of the run, packed or not, are what they were."""
    model = build_model(config_of(setting, tmp_path, model__pack_experts=True), ExpertShard())
    routers = [layer.router for layer in model.moe_layers]
    weights = [layer.experts.gate_up_EGD.clone() for layer in model.moe_layers]
    with unmodified(model):
        assert {layer.router.name for layer in model.moe_layers} == {"top_k"}
        assert not model.training
        with gate_and_up_exchanged(model):
            for layer, before in zip(model.moe_layers, weights, strict=True):
                gate, up = before.chunk(2, dim=1)
                assert torch.equal(layer.experts.gate_up_EGD, torch.cat([up, gate], 1))
                assert not layer.experts.pack
    for layer, router, before in zip(model.moe_layers, routers, weights, strict=True):
        assert layer.router is router and layer.experts.pack and model.training
        assert torch.equal(layer.experts.gate_up_EGD, before)


def golden_lines(rank: int, config, continuations: list) -> list:
    backbone = Backbone.named("olmoe")
    found = []
    for number, ids in continuations:
        backbone.published_parameters = number
        backbone.golden = Golden("The-1B", 28, (7,), tuple(ids))
        found.append(look(rank, [config])[0][2:])
    return found


def test_the_public_model_writes_what_it_is_known_to(setting, tmp_path):
    """Asked only of a folder with its number of parameters."""
    stock = OlmoeForCausalLM.from_pretrained(setting["hf"])
    ids = torch.tensor([[7]])
    for _ in range(6):
        ids = torch.cat([ids, stock(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    written, number = ids[0, 1:].tolist(), stock.num_parameters()
    asked = [(number, written), (number, [*written[:-1], 1]), (number + 1, written)]
    ((same, other, none),) = run_ranks(
        golden_lines, 1, config_of(setting, tmp_path, model__dtype="float32"), asked
    )
    assert same == [f"after the token ids [7] it writes {written}: as The-1B does"]
    assert other[0].endswith(f"differs: The-1B writes {[*written[:-1], 1]}") and none == []


def dry_run(config, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.dump_yaml())
    return run_python("launch/train.py", recipe, "--dry-run")


def test_a_loss_that_is_no_number_ends_a_dry_run(setting, tmp_path):
    """Weights that are numbers, of which the loss is none."""
    folder = tmp_path / "overflows"
    shutil.copytree(setting["hf"], folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][:] = torch.finfo(torch.float32).max
        save_file(tensors, file, metadata={"format": "pt"})
    done = dry_run(config_of(setting, tmp_path, model__checkpoint=str(folder)), tmp_path)
    assert done.returncode == 2, done.stdout[-2000:]
    assert "the loss of the unmodified model on the first samples is nan" in done.stderr
    assert "is fine" not in done.stdout


@pytest.mark.parametrize(
    "loss, skipped, words",
    [
        (1.5, 0, None),
        (float("nan"), 0, "the step was taken: loss/total=nan is not finite"),
        (float("inf"), 1, "the step was skipped: loss/total=inf is not finite"),
        (1.5, 1, "the step was skipped: its gradient is not finite"),
    ],
)
def test_a_step_that_is_not_fine(monkeypatch, loss, skipped, words):
    monkeypatch.setattr(trainer, "sum_over_ranks", lambda tensor: None)
    stats, world = StatSum(), SimpleNamespace(device=torch.device("cpu"))
    stats.add("loss/total", Stat(torch.tensor(loss)))
    taken = SimpleNamespace(stats=stats, world=world, newly_skipped=skipped)
    if words is None:
        assert trainer.Trainer.refuse_bad_losses(taken) == loss
        return
    with pytest.raises(DataError, match=words):
        trainer.Trainer.refuse_bad_losses(taken)
