"""MoEHandle: what a converted model is told of its tokens."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

import gemoe_ds.routers  # noqa: F401  (registers every router)
from tests.models.stock import IMAGE, batch, converted


@pytest.mark.parametrize("name", ["olmoe", "qwen2"])  # a mask, and a mask for each kind of layer
def test_a_static_cache_changes_nothing(name):
    model, handle = converted(name=name)
    given = {n: t.flip(1) for n, t in batch(labels=False).items()}  # padding on the left
    options = given | {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    want = model.eval().generate(**options)
    assert torch.equal(model.generate(**options, cache_implementation="static"), want)


def test_images_are_told_by_their_token():
    model, handle = converted("ltdr", "qwen3_vl", k=1, tail_k=8)
    given = batch(labels=False)
    given["input_ids"][0, 2:5] = IMAGE
    with torch.no_grad():
        handle.begin(given["attention_mask"])  # the rest is as ever
        model(**given)
        assert handle.ctx.is_vision_T.sum() == 3
        handle.begin(given["attention_mask"], given["input_ids"] == IMAGE)
        model(
            **given | {"input_ids": given["input_ids"].masked_fill(given["input_ids"] == IMAGE, 5)}
        )
    assert handle.ctx.is_vision_T.sum() == 3
    many = torch.stack(handle.k_per_layer).amax(0) > 1
    assert many.any() and not many[given["input_ids"] != IMAGE].any()
    with pytest.raises(RuntimeError, match="inputs_embeds alone: call handle.begin"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    handle.begin(torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="inputs_embeds alone: call handle.begin"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


def test_masks_say_the_same_in_two_and_in_four_dimensions():
    model, handle = converted()
    given = batch(labels=False)
    valid = given["attention_mask"].bool()
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    four = causal & valid[:, None, None, :]
    with torch.no_grad():
        model(**given)
        want = handle.k_per_layer
        low = torch.finfo(torch.float32).min
        for mask in (four, torch.zeros(four.shape).masked_fill(~four, low)):
            model(given["input_ids"], mask)
            assert all(map(torch.equal, handle.k_per_layer, want))
        with pytest.raises(RuntimeError, match=r"\[2, 1, 1, 7\] does not say.*handle.begin"):
            model(given["input_ids"], four[:, :, :1])


def trained(name: str, **options):
    model, handle = converted(name, **options)
    (model.train()(**batch()).loss + handle.aux_loss()).backward()
    return model.eval(), handle


@pytest.mark.parametrize("name", ["threshold", "dtop_p", "remoe", "dynmoe"])
def test_a_router_that_has_counted_for_nothing_warns_once_when_it_is_evaluated(name):
    model, handle = trained(name)
    with pytest.warns(UserWarning, match=f"router '{name}' is evaluated after .*trainer_callback"):
        model(**batch())
    with warnings.catch_warnings(action="error"):
        model(**batch())


def test_nobody_is_warned_who_calls_after_step_or_need_not():
    with warnings.catch_warnings(action="error"):
        model, handle = trained("gemoe", k_low=1)
        model(**batch())
        model, handle = converted("threshold")
        model.eval()(**batch())  # before any training
        model, handle = trained("threshold")
        handle.after_step(1, 2)
        model(**batch())
        (model.train()(**batch()).loss + handle.aux_loss()).backward()
        model.eval()(**batch())  # between two steps


def test_the_callback_hands_on_how_zero_writes_and_how_far_trainer_is():
    model, handle = trained("threshold")
    callback, state = handle.trainer_callback(assign_=print), SimpleNamespace(max_steps=9)
    seen = []
    handle.after_step = lambda *given, **named: seen.append((given, named))
    for state.global_step in (0, 8):
        callback.on_optimizer_step(None, state, None, model=model)
    assert seen == [((n, 9), {"assign_": print, "read_param": None}) for n in (1, 9)]


def test_routers_keep_their_precision_whatever_the_model_is_moved_to():
    model, handle = converted("threshold")
    model.to(torch.bfloat16)
    state = [*handle.routers[0].parameters(), *handle.routers[0].buffers()]
    assert {tensor.dtype for tensor in state} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    (model.train()(**batch()).loss + handle.aux_loss()).backward()
    assert model.to("meta").double() and {
        p.device.type for p in handle.routers[0].parameters()
    } == {"meta"}
    assert {p.dtype for p in handle.routers[0].parameters()} == {torch.float64}


def test_routers_that_something_else_has_made_narrow_do_not_train():
    model, handle = converted()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()  # as DeepSpeed's bf16 does
    with pytest.raises(RuntimeError, match="have become torch.bfloat16, .* load the model with"):
        model.train()(**batch())
    model.eval()(**batch())
