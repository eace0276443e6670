"""A model that transformers has no class for takes what transformers' own models take."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.export.families import FAMILIES, user, write_exported
from tests.models.small import noise

TRUST = {"trust_remote_code": True}
OWN = [name for name in FAMILIES if name != "upcycled"]
SLOW = {*OWN} - {"deepseek_vl2"}  # for the time of CI alone


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in OWN],
)
def loaded(request, tmp_path_factory):
    """A model, and a batch with a picture and with padding."""
    folder = write_exported(request.param, tmp_path_factory.mktemp("own")).folder
    processor = AutoProcessor.from_pretrained(folder, **TRUST)
    asked = [[user({"type": "image"}, "What is this?")], [user("Well?")]]
    texts = [processor.apply_chat_template(messages) for messages in asked]
    batch = processor(text=texts, images=[[noise(60, 90)], []])
    return AutoModelForImageTextToText.from_pretrained(folder, **TRUST), dict(batch)


def gradients(model, batch):
    """By name; None: not needed."""
    model.zero_grad()
    out = model(**batch, labels=batch["input_ids"], use_cache=False)
    out.loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_the_same_when_layers_are_recomputed(loaded):
    model, batch = loaded
    model.train()
    wanted = gradients(model, batch)
    model.gradient_checkpointing_enable()
    try:
        assert model.is_gradient_checkpointing
        found = gradients(model, batch)
    finally:
        model.gradient_checkpointing_disable()
    assert wanted.keys() == found.keys() and len(wanted) > 20
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_a_tuple_is_given_where_one_is_asked_for(loaded):
    model, batch = loaded
    model.eval()
    named = model(**batch, labels=batch["input_ids"], output_hidden_states=True)
    loss, logits, *_ = model(**batch, labels=batch["input_ids"], return_dict=False)
    assert torch.equal(loss, named.loss) and torch.equal(logits, named.logits)
    model.config.return_dict = False
    try:
        found = model(**batch)
        assert isinstance(found, tuple) and torch.equal(found[0], named.logits)
        assert torch.equal(model(**batch, return_dict=True).logits, named.logits)
    finally:
        model.config.return_dict = True
