"""Log-likelihoods against one plain forward a continuation, on ragged documents of every kind."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from gemoe_ds.data.collate import Encoded
from gemoe_ds.evaluation.benchmarks import likelihood
from gemoe_ds.evaluation.benchmarks.likelihood import Context, log_likelihoods
from gemoe_ds.models.inputs import ModelInputs
from tests.models.test_kv_cache import loaded, samples  # noqa: F401  (a fixture)


def by_hand(model, collator, prompt, ids):
    """All logits of one sequence; the sum of the log-probabilities."""
    row = likelihood._followed(prompt, ids)
    batch = collator.batch([row])
    inputs = batch.model_inputs
    with torch.no_grad():
        hidden = model.hidden(inputs)
        log_p = model.backbone.head(model.hf)(hidden)[0].log_softmax(-1)
    first = len(prompt.input_ids) - 1
    rows = log_p[first : first + len(ids)]
    total = sum(rows[place, token].item() for place, token in enumerate(ids))
    return total, rows.argmax(-1).tolist() == list(ids)


def make_contexts(collator, sees, rng):
    """Text alone and behind an image; one option or several, of one token and of more."""
    vocabulary = sorted(
        set(range(len(collator.tokenizer))) - set(collator.tokenizer.all_special_ids)
    )

    def words(number):
        return rng.choices(vocabulary[:40], k=number)

    prompts = [collator.prompt(row, sample) for row, sample in enumerate(samples(sees))]
    for length in (1, 3, 12, 30):
        prompts.append(Encoded(9, "text"))
        prompts[-1].add(words(length))
    lengths = [[1, 1, 1, 1], [5], [1, 4, 7, 1], [3, 3], [6, 2, 1], [1], [2, 9, 4, 4]]
    return [
        Context(100 + n, prompt, {i: words(size) for i, size in enumerate(lengths[n])})
        for n, prompt in enumerate(prompts)
    ]


def test_as_one_forward_a_continuation(loaded, monkeypatch):  # noqa: F811
    monkeypatch.setattr(likelihood, "_AT_ONCE", 5)
    model, collator = loaded
    contexts = make_contexts(collator, model.image_layout is not None, random.Random(0))
    contexts = [row for context in contexts for row in context.rows(True)]
    expected = [
        {i: by_hand(model, collator, c.prompt, ids) for i, ids in c.continuations.items()}
        for c in contexts
    ]
    # A likeliest token makes an answer greedy.
    counted = []

    def count(kind_BS, doc_B, index_B):
        assert kind_BS.shape[0] == len(doc_B) == len(index_B)
        counted.append((kind_BS, model.ctx.is_valid_T.reshape(kind_BS.shape), doc_B, index_B))

    found = log_likelihoods(model, collator, contexts, torch.device("cpu"), count, shared=True)
    for ours, by_one in zip(found, expected, strict=True):
        assert ours.keys() == by_one.keys()
        for index, (value, is_greedy) in by_one.items():
            assert ours[index] == (pytest.approx(value, rel=1e-6, abs=2e-6), is_greedy)
    assert len(counted) == 2
    check_counts(contexts, counted)


def check_counts(contexts, counted):
    """Every token of a context once, and every token of a continuation but its last."""
    tokens = {}
    for kind_BS, is_valid_BS, doc_B, _ in counted:
        for kind_S, is_valid_S, doc in zip(kind_BS, is_valid_BS, doc_B, strict=True):
            sums = np.bincount(kind_S[is_valid_S].numpy(), minlength=3)
            tokens[doc] = tokens.get(doc, 0) + sums
    expected = {}
    for c in contexts:
        images = sum(c.prompt.is_vision)
        rest = len(c.prompt.input_ids) - images
        written = sum(len(ids) - 1 for ids in c.continuations.values())
        expected[c.doc_id] = expected.get(c.doc_id, 0) + np.array([images, rest, written])
    assert {doc: list(sums) for doc, sums in tokens.items()} == {
        doc: list(sums) for doc, sums in expected.items()
    }
    places = [place for _, _, *of in counted for place in zip(*of, strict=True)]
    assert len(set(places)) == len(places)


def test_one_forward_where_nothing_is_shared(loaded):  # noqa: F811
    model, collator = loaded
    contexts = make_contexts(collator, False, random.Random(1))
    single = [replace(c, continuations={0: c.continuations[0]}) for c in contexts]
    calls = []
    found = log_likelihoods(
        model, collator, single, torch.device("cpu"), lambda *of: calls.append(of), shared=False
    )
    assert len(calls) == 1
    for context, scored in zip(single, found, strict=True):
        value, is_greedy = by_hand(model, collator, context.prompt, context.continuations[0])
        assert scored[0] == (pytest.approx(value, rel=1e-6, abs=2e-6), is_greedy)


def test_greedy_continuations_are_told(loaded):  # noqa: F811
    model, collator = loaded
    prompt = Encoded(0, "text")
    prompt.add([5, 6, 5, 6, 7, 8, 9, 5, 6])
    ids, written = list(prompt.input_ids), []
    for _ in range(3):
        at = torch.tensor([ids])
        valid = torch.ones_like(at, dtype=torch.bool)
        with torch.no_grad():
            hidden = model.hidden(ModelInputs(at, valid, ~valid))
            written.append(int(model.backbone.head(model.hf)(hidden[0, -1]).argmax()))
        ids.append(written[-1])
    other = [*written[:2], (written[2] + 1) % 7]
    context = Context(0, prompt, {0: written, 1: other, 2: written[:1]})
    (found,) = log_likelihoods(
        model, collator, [context], torch.device("cpu"), lambda *of: None, shared=True
    )
    assert [found[i][1] for i in range(3)] == [True, False, True]


def test_a_rank_without_documents(loaded):  # noqa: F811
    model, collator = loaded
    calls = []
    for shared in (False, True):
        assert (
            log_likelihoods(
                model,
                collator,
                [],
                torch.device("cpu"),
                lambda *of: calls.append(of),
                shared=shared,
            )
            == []
        )
    assert not calls and not model.ctx.is_valid_T.any()
