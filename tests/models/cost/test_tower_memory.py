"""What a tower is said to hold, from shapes, against what torch's profiler sees it allocate."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.cost.tower_memory import tower_bytes
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.router import Router
from tests.models.cases import CASES

SEE = [name for name, case in CASES.items() if case.sees]
# Bytes of kernels for themselves, whatever the picture; those without AVX-512 take more.
SCRATCH = 2**15 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 2**18


class Reached(Exception):
    pass


def allocated(model, text, inputs, *, trains):
    """At most at once, and at the start of the language model, beside what was there before."""
    marks = []

    def reached(module, args, kwargs):
        with torch.profiler.record_function("reached"):
            pass
        if trains:
            kwargs["inputs_embeds"].backward(torch.ones_like(kwargs["inputs_embeds"]))
            marks.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
        raise Reached

    text.register_forward_pre_hook(reached, with_kwargs=True)
    with (
        pytest.raises(Reached),
        torch.set_grad_enabled(trains),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        model.backbone.hidden(model.hf, inputs)
    now = most = kept = 0
    events = profiled.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
        elif event.name() == "reached":
            kept = now
    return most, kept, sum(marks)


@pytest.mark.parametrize("train", ["routers", "all"])
@pytest.mark.parametrize("name", SEE)
def test_bytes_are_those_that_the_tower_allocates(name, train, folders):
    folder, tokenizer = folders(name)
    backbone = Backbone.named(name)
    backbone = backbone(backbone.Config())
    router = Router.named("top_k")
    model = MoEModel.from_checkpoint(
        backbone, folder, tokenizer, (router, router.Config()), train=train
    )
    layout = model.image_layout
    image = layout(Image.new("RGB", (300, 200)))
    ids = torch.tensor([image.input_ids])
    images = {
        "pixels": torch.from_numpy(image.pixels),
        "feature_BS": torch.from_numpy(image.feature_P)[None],
        **{name: torch.from_numpy(extra) for name, extra in image.extras.items()},
    }
    valid = torch.ones_like(ids).bool()
    inputs = ModelInputs(ids, valid, images["feature_BS"] >= 0, images)
    trains = train == "all"
    meta_model = backbone.load(folder, tokenizer)
    path = backbone.moe_blocks(meta_model)[0].path.partition(".layers.")[0]
    most, kept = tower_bytes(
        backbone,
        meta_model,
        meta_model.get_submodule(path),
        inputs,
        torch.float32,
        trains=trains,
        activation_checkpointing=False,
    )
    text = model.hf.get_submodule(path)
    text.embed_tokens.requires_grad_(False)
    real_most, real_kept, gradients = allocated(model, text, inputs, trains=trains)
    assert kept == pytest.approx(real_kept, rel=0.1)
    assert real_most - gradients - SCRATCH <= most * 1.1 and most <= real_most * 1.1
