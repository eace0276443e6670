"""Every forward of an exported model has its own tokens: in threads, in copies, recomputed."""

from __future__ import annotations

import copy
import io
import threading
from dataclasses import replace

import pytest
import torch

from gemoe_ds.export.contexts import Contexts, on
from tests.export.loaded import batches, load, logits
from tests.routers.cases import SPEC, all_variants, case_id, make_router


@pytest.fixture(scope="module")
def model(olmoe_folder):
    return load(olmoe_folder)


def test_threads_that_ask_at_once_get_what_they_get_alone(model):
    wanted = [(logits(model, batch), model.k_per_layer) for batch in batches()]
    wrong = []

    def ask(number: int) -> None:
        found, k = wanted[number]
        for _ in range(20):
            same = torch.equal(logits(model, batches()[number]), found)
            if not (same and all(map(torch.equal, model.k_per_layer, k))):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_k_per_layer_is_of_the_thread_that_asks(model):
    logits(model, batches()[0])
    said = []

    def ask() -> None:
        with pytest.raises(RuntimeError, match="no forward has run yet in this thread") as error:
            model.k_per_layer  # noqa: B018
        said.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert said


def stored(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, stored])
def test_a_copy_has_tokens_and_weights_of_its_own(model, copied):
    one, other = batches()
    wanted = logits(model, one)
    k = model.k_per_layer
    twin = copied(model)
    logits(model, other)
    assert torch.equal(logits(twin, one), wanted)
    assert all(map(torch.equal, twin.k_per_layer, k))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, one), wanted)
    assert not logits(twin, one).any()


def gradients(model, batch, between=None):
    model.zero_grad()
    loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
    if between is not None:
        logits(model, between)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_what_is_recomputed_finds_the_forward_that_it_was(olmoe_folder):
    model = load(olmoe_folder).train()
    one, other = batches()
    wanted = gradients(model, one)
    model.gradient_checkpointing_enable()
    other = {name: tensor[:, :-1] for name, tensor in other.items()}
    found = gradients(model, one, between=other)
    assert wanted.keys() == found.keys() and len(wanted) > 10
    torch.testing.assert_close(found, wanted)


def test_a_thread_of_autograd_finds_it_too(monkeypatch):
    """On a GPU what is recomputed runs in a thread that has called no model."""
    contexts = Contexts(1)
    contexts.begin(None, torch.zeros(1, 3, dtype=torch.bool))
    monkeypatch.setattr("gemoe_ds.export.contexts.in_backward", lambda: True)
    found = []
    thread = threading.Thread(target=lambda: found.append(contexts.of_block()))
    thread.start()
    thread.join()
    assert found == [contexts.own]


def test_a_module_within_the_model_is_not_to_be_called(model):
    with pytest.raises(RuntimeError, match="outside a forward of its model.*from_pretrained gave"):
        logits(model, batches()[0])
        model.model(batches()[1]["input_ids"])


def test_masks_are_where_the_block_is():
    contexts = Contexts(1)
    contexts.begin(None, torch.zeros(1, 3, dtype=torch.bool))
    ctx = contexts.own
    assert on(torch.device("cpu"), ctx) is ctx
    moved = on(torch.device("meta"), ctx)
    masks = moved.is_valid_T, moved.is_vision_T, moved.sequence_T
    assert {mask.device.type for mask in masks} == {"meta"} and moved.layers is ctx.layers
    assert ctx.is_valid_T.device.type == "cpu"


def route_on_two_devices(name, options):
    """The second layer lies on another device: that of shapes alone."""
    contexts, valid = Contexts(2), torch.arange(6)[None] > 1
    contexts.begin(valid, ~valid)
    for slot, device in enumerate(("cpu", "meta")):
        spec = replace(SPEC, slot=slot, num_layers=2)
        router = make_router(name, options, spec, seed=slot).eval().to(device)
        x_TD = torch.randn(6, SPEC.d_model).to(device)
        ctx = on(x_TD.device, contexts.own)
        decision, logits_TE = router.decide(ctx.without_padding(x_TD), ctx)
        router.record_of(ctx).logits_TE = logits_TE
        assert decision.mask_TE.device == decision.weights_TE.device == x_TD.device


@torch.no_grad()
@pytest.mark.parametrize("case", all_variants(), ids=case_id)
def test_layers_may_lie_on_two_devices(case, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # knows no meta
    route_on_two_devices(*case)


@torch.no_grad()
def test_what_layers_count_together_moves_to_the_first(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        route_on_two_devices("threshold", {"hold": True})


def test_it_can_be_compiled(model):
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for batch in batches():
        assert torch.equal(logits(compiled, batch), logits(model, batch))
    torch.compiler.reset()
