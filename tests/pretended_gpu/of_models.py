"""Whole models on a pretended GPU: test_pretended_gpu.py starts these in a process of their own."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from gemoe_ds.data.collate import Batch, Collator
from gemoe_ds.data.sample import open_samples
from gemoe_ds.evaluation.fixed_step import FixedStep
from gemoe_ds.evaluation.generate import generate
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.distill import divergence
from gemoe_ds.models.images import ON_HOST
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.models.tokenizer import load_tokenizer
from gemoe_ds.moe.dispatch import AllToAllDispatcher
from gemoe_ds.moe.router import Router
from tests.models.cases import CASES, write_case, write_text
from tests.models.qwen3_vl import small as qwen3_vl
from tests.pretended_gpu.gpu import on_gpu, pretended_gpu, real
from tests.pretended_gpu.of_layer import RANKS, assert_close, gradients, loopback
from tests.tiny import make_model, random_batch
from tests.train.resuming import write_data

# Waits of the host beside one a layer, in the forward and in the backward pass.
WAITS = {
    "olmoe": (3, 0),  # where targets are, padding on the left, transformers: packed sequences
    "deepseek_vl2": (4, 0),  # where features go
    # not the third, but twice in transformers' code for each of two that DeepStack adds
    "qwen3_vl_moe": (7, 6),
}


def build(name: str, folder) -> MoEModel:
    backbone, gemoe = Backbone.named(name), Router.named("gemoe")
    torch.manual_seed(0)
    return MoEModel.from_checkpoint(
        backbone(backbone.Config()),
        folder / "base",
        folder / "tokenizer",
        (gemoe, gemoe.Config()),
        dtype=torch.bfloat16,
    )


def text_prompts() -> Batch:
    """Two of five and three tokens, padded on the left."""
    ids = torch.randint(6, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :2] = False
    nothing, turns = torch.zeros_like(valid), torch.full(ids.shape, -1, dtype=torch.int16)
    return Batch(ids, torch.full_like(ids, -100), valid, nothing, turns, {}, ("0", "1"), (0, 1))


def batch_of(name: str, model: MoEModel, folder) -> Batch:
    sees = CASES[name].sees
    data = (write_data if sees else write_text)(folder / "data")
    tokenizer = load_tokenizer(folder / "tokenizer", model.backbone.chat)
    collator = Collator(tokenizer, model.image_layout, model.backbone.chat, max_length=400)
    samples = open_samples(data)
    return collator.batch([collator.encode(row, samples[row]) for row in range(2)])


@pytest.mark.parametrize("name", WAITS)
def test_a_training_step(name, tmp_path, monkeypatch):
    # As wide as a grouped product takes them.
    monkeypatch.setitem(qwen3_vl.CONFIG["text_config"], "moe_intermediate_size", 16)
    write_case(name, tmp_path)
    model, reference = build(name, tmp_path), build(name, tmp_path)
    model.ctx.trace = reference.ctx.trace = True
    inputs = batch_of(name, model, tmp_path).inputs
    wanted = reference.train()(**inputs)
    wanted["loss"].backward()
    images = inputs.pop("images")
    with pretended_gpu() as gpu:
        on_gpu(model).train()
        images = {n: one if n in ON_HOST else on_gpu(one) for n, one in images.items()}
        parts = model(**on_gpu(inputs), images=images)
        others, in_backward = WAITS[name]
        assert gpu.waits.total() == len(model.moe_layers) + others, dict(gpu.waits)
        gpu.forget()
        parts["loss"].backward()
        assert gpu.waits.total() == in_backward, dict(gpu.waits)
        assert not gpu.mixed and not gpu.uploads, (gpu.mixed, gpu.uploads)
    assert_close(parts["loss"], wanted["loss"], "loss")
    found, expected = gradients(model), gradients(reference)
    assert found.keys() == expected.keys()
    k, k_ref = (torch.cat([real(r.k_T) for r in m.ctx.layers]) for m in (model, reference))
    assert (k == k_ref).float().mean() > 0.98  # rounding decides where a token is at an edge
    for name, grad in found.items():
        difference = (real(grad) - expected[name]).norm() / expected[name].norm()
        assert difference < 0.15, (name, difference)


@pytest.mark.parametrize("experts_dtype", [None, "nf4"])
def test_steps_of_an_answer_could_be_one_graph(base, experts_dtype, monkeypatch):
    """What `FixedStep.capture` would record: no wait, nothing from the host, the same launches on
    the same shapes every time, and the tokens that are written without."""
    model = make_model(base, dtype=torch.bfloat16, experts_dtype=experts_dtype)
    prompts = text_prompts()
    options = {"max_new_tokens": 6, "end_ids": set(), "count": False}
    want = generate(model, prompts, **options).token_ids
    steps = []

    def counted(step):
        gpu.forget()
        gpu.made.clear()
        gpu.uploads.clear()
        run(step)
        shapes = [tuple(one().shape) for one in gpu.made if one() is not None]
        steps.append((gpu.launches.copy(), shapes, gpu.waits.copy(), gpu.uploads.copy()))

    run = FixedStep.run
    monkeypatch.setattr(FixedStep, "run", counted)
    monkeypatch.setattr(FixedStep, "capture", lambda step: None)
    with pretended_gpu() as gpu:
        on_gpu(model)
        inputs = {n: on_gpu(t) for n, t in prompts.inputs.items() if n != "images"}
        found = generate(model, replace(prompts, **inputs), **options, cuda_graph=True)
        assert not gpu.mixed, gpu.mixed
    assert found.token_ids == want
    assert len(steps) == 5
    for launches, shapes, waits, uploads in steps:
        assert not waits and not uploads, (waits, uploads)
        assert launches == steps[0][0] and shapes == steps[0][1]


@pytest.mark.parametrize(
    "recompute, ranks", [(False, 1), (True, RANKS)], ids=["kept", "recomputed with EP"]
)
def test_nothing_stays_alive_after_a_step(base, recompute, ranks):
    """All of a model's layers; those of one layer alone: of_layer.py."""
    shard = ExpertShard(0, ranks, lambda: AllToAllDispatcher(loopback, 0, ranks))
    model = make_model(base, shard=shard, activation_checkpointing=recompute, dtype=torch.bfloat16)
    gc.disable()
    alive = []
    with pretended_gpu() as gpu:
        on_gpu(model).train()
        batch = on_gpu(random_batch(0))
        for _ in range(3):
            model(**batch)["loss"].backward()
            model.zero_grad()
            alive.append(gpu.alive())
    gc.enable()
    assert alive[0] == max(alive), alive


def test_a_divergence_keeps_nothing_and_never_waits():
    """More rows than are looked at in one go."""
    g = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(300, 7, generator=g) for _ in range(2))
    wide = logits.double().requires_grad_()
    log_q, log_p = (one.log_softmax(-1) for one in (wide / 2, teacher.double() / 2))
    torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True).backward()
    alive = []
    with pretended_gpu() as gpu:
        student, taught = on_gpu(logits), on_gpu(teacher)
        gpu.forget()
        for _ in range(2):
            student.grad = None
            divergence(student.requires_grad_(), taught, 2.0).backward()
            alive.append(gpu.alive())
        assert not gpu.waits and not gpu.uploads and not gpu.mixed, (gpu.waits, gpu.uploads)
    assert_close(student.grad, wide.grad, "gradient")
    assert alive[0] == alive[1]


def test_rollouts(base):
    """Ada-K samples without a wait more than one a layer and forward."""
    model = make_model(base, "ada_k", {"warm_steps": 0}, dtype=torch.bfloat16)
    with pretended_gpu() as gpu:
        on_gpu(model).train()
        batch = on_gpu(random_batch(0))
        gpu.forget()
        rolled_out = model(**batch, roll_out=True)
        model(**batch, rolled_out=rolled_out)["loss"].backward()
    assert not gpu.mixed and not gpu.uploads
    assert not [place for place in gpu.waits if "/routers/" in place], gpu.waits
