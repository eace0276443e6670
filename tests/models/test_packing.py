"""Documents behind each other in a row are to the model what they are one by one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from gemoe_ds.data.collate import Collator
from gemoe_ds.data.pack import joined
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.distill import Distill
from gemoe_ds.models.kv_cache import PACKS, positions_within
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.tokenizer import load_tokenizer
from gemoe_ds.moe.router import Router
from tests.data.ragged import ragged
from tests.models.cases import CASES
from tests.tiny import WORDS

ROWS = (3, 1, 2)  # documents of each row


def build(folders, name, router="top_k", train="all") -> tuple[MoEModel, Collator]:
    base, tokenizer = folders(name)
    chosen, family = Router.named(router), Backbone.named(name)
    torch.manual_seed(0)
    backbone, made = family(family.Config()), (chosen, chosen.Config())
    model = MoEModel.from_checkpoint(backbone, base, tokenizer, made, train=train).train()
    layout = model.image_layout
    read = load_tokenizer(tokenizer, family.chat, layout and layout.token)
    return model, Collator(read, layout, family.chat, max_length=400)


def documents(collator, seed=0, number=6):
    """Talks, and texts where the tokenizer has what they end with."""
    rng = random.Random(seed)
    texts = not collator.conversations._lacking
    samples = [ragged(rng, str(i), pictures=0, system=False, texts=texts)[0] for i in range(number)]
    return [collator.encode(i, sample) for i, sample in enumerate(samples)]


def in_rows(encoded):
    some = iter(encoded)
    return [joined([next(some) for _ in range(row)]) for row in ROWS]


def gradients(model, batch, **options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(**batch.inputs, targets_per_micro_batch=1.0, **options)["loss"]
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def alike(one, other, tolerance=1e-5):
    """A gradient that is but rounding, as that of a bias of keys, may be of another size."""
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=0)
    assert one[1].keys() == other[1].keys() and len(one[1]) > 3
    most = max(float(gradient.abs().max()) for gradient in other[1].values())
    for name, gradient in one[1].items():
        expected = other[1][name]
        atol = tolerance * max(0.01 * most, float(expected.abs().max()))
        torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=atol, msg=name)


ALIKE = {"upcycled", "molmoe", "moe_llava_stablelm", "moe_llava_qwen"}  # in how they are called


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name
        for name in ("tiny", "upcycled", *CASES)
    ],
)
def test_loss_and_gradients_are_those_of_the_documents_one_by_one(folders, name):
    model, collator = build(folders, name)
    encoded, lm = documents(collator), {"auxiliary_weight": 0.0}  # others are means over a batch
    batch = collator.batch(in_rows(encoded))
    assert batch.document_BS is not None and batch.ids == tuple(e.id for e in encoded)
    loss, total = gradients(model, collator.batch(encoded[:1]), **lm)
    for one in encoded[1:]:
        alone = gradients(model, collator.batch([one]), **lm)
        loss = loss + alone[0]
        for n, gradient in alone[1].items():
            total[n] += gradient
    for attention in PACKS:
        for part in model.hf.modules():
            if isinstance(part, PreTrainedModel):
                part.set_attn_implementation(attention)
        alike(gradients(model, batch, **lm), (loss, total))


@pytest.mark.parametrize("router", ["gemoe", "threshold", "ltdr", "ada_k"])
def test_routers_see_sequences_not_rows(folders, router):
    """Packed or padded, auxiliary losses are the same, and what is drawn for a sequence."""
    model, collator = build(folders, "tiny", router, train="experts")
    encoded = documents(collator)
    found = []
    for rows in (in_rows(encoded), encoded):
        batch = collator.batch(rows)
        torch.manual_seed(7)
        inputs = batch.inputs
        options = {"rolled_out": model(**inputs, roll_out=True)} if model.rollouts else {}
        found.append(gradients(model, batch, **options))
    alike(*found)


@pytest.mark.parametrize("tokens", ["answers", "text", "all"])
def test_a_teacher_is_listened_to_at_the_same_positions(folders, tokens):
    model, collator = build(folders, "tiny", "gemoe", train="routers")
    model.distill = Distill(tokens=tokens)
    encoded, found = documents(collator), []
    for rows in (in_rows(encoded), encoded):
        batch = collator.batch(rows)
        taught = model(**batch.inputs, teach=True)
        found.append(gradients(model, batch, **taught, distilled_per_micro_batch=1.0))
        found[-1][1]["number"] = torch.tensor(float(len(taught["taught_PD"])))
    assert found[0][1]["number"] == found[1][1]["number"]
    alike(*found)


def test_no_token_sees_another_document(folders):
    """To the last bit, in every position of the others."""
    model, collator = build(folders, "olmoe")
    encoded = documents(collator)
    batch = collator.batch(in_rows(encoded))
    changed = batch.input_ids_BS.clone()
    is_third_BS = batch.document_BS == 2
    changed[is_third_BS] = torch.randint(6, len(WORDS), (int(is_third_BS.sum()),))
    with torch.no_grad():
        one, other = (
            model.hidden(replace(batch.model_inputs, input_ids_BS=ids))
            for ids in (batch.input_ids_BS, changed)
        )
    apart_BS = (one != other).any(-1)
    assert not apart_BS[~is_third_BS & batch.is_valid_BS].any() and apart_BS[is_third_BS].any()


def test_positions_begin_again_in_each_document():
    document_BS = torch.tensor([[0, 0, 0, 1, 2, 2], [3, 3, 4, 4, 4, 4], [5, 5, 5, 5, 5, 5]])
    assert positions_within(document_BS).tolist() == [
        [0, 1, 2, 0, 0, 1],
        [0, 1, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5],
    ]
