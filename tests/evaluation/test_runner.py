"""Scores by kind, independent of batch size and of the split over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemoe_ds.backbones.tokenizer import load_tokenizer
from gemoe_ds.data.collate import Collator
from gemoe_ds.data.dataset import EvalStream
from gemoe_ds.data.sample import open_samples
from gemoe_ds.evaluation.runner import Scores, evaluate
from tests.tiny import make_model, write_base
from tests.train.resuming import write_data


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    base = write_base(root)
    model = make_model(base, "gemoe")
    collator = Collator(
        load_tokenizer(base[1]),
        model.image_layout,
        model.backbone.chat,
        max_length=64,
    )
    return model, open_samples(write_data(root / "data", 11)), collator


def scored(setting, batch, world=1):
    model, samples, collator = setting
    parts = [
        evaluate(
            model,
            samples,
            EvalStream(samples, collator, batch=batch, rank=rank, world=world),
            torch.device("cpu"),
            lambda part: [part],
        )
        for rank in range(world)
    ]
    return Scores.merged(parts)


@pytest.mark.parametrize("batch, world", [(1, 1), (4, 1), (11, 1), (3, 2), (5, 3)])
def test_batching_and_ranks_change_no_score(setting, batch, world):
    reference, other = scored(setting, 2), scored(setting, batch, world)
    assert other.right == reference.right and other.asked == reference.asked
    assert np.array_equal(other.load_LE, reference.load_LE)
    for a, b in zip(other.tokens(), reference.tokens(), strict=True):
        assert np.allclose(np.sort(a, axis=-1), np.sort(b, axis=-1), atol=1e-5)


def test_right_answers_equal_greedy_generation(setting):
    """An answer counts iff greedy decoding, token by token, would write exactly it."""
    model, samples, collator = setting
    model.eval()
    right, asked = {"x": 0, "y": 0}, {"x": 0, "y": 0}
    for row in range(len(samples)):
        sample, encoded = samples[row], collator.encode(row, samples[row])
        batch = collator.batch([encoded])
        for index, turn in enumerate(sample.turns):
            places = [i for i, t in enumerate(encoded.turn) if t == index]
            text = batch.input_ids_BS[0, : places[0]].tolist()
            wanted = [encoded.input_ids[i] for i in places]
            while wanted and _next_token(model, text, batch.images) == wanted[0]:
                text.append(wanted.pop(0))
            right[turn.kind] += not wanted
            asked[turn.kind] += 1
    scores = scored(setting, 4)
    assert dict(scores.asked) == asked
    assert {kind: scores.right[kind] for kind in asked} == right


def _next_token(model, text: list[int], images: dict) -> int:
    ids = torch.tensor([text])
    is_vision = ids == model.image_layout.token_id
    images = images | {"feature_BS": (is_vision.cumsum(1) - 1).where(is_vision, -1)}
    with torch.no_grad():
        hidden = model.hidden(ids, torch.ones_like(is_vision), is_vision, images)
        return model.backbone.head(model.hf)(hidden[:, -1]).argmax(-1).item()


def test_accuracy_is_the_mean_over_kinds():
    from collections import Counter

    scores = Scores(Counter(a=1, b=3), Counter(a=1, b=6))
    assert scores.accuracy_by_kind == {"a": 1.0, "b": 0.5}
    assert (scores.accuracy, scores.accuracy_micro) == (0.75, 4 / 7)
