"""Written answers: those of a loop without a cache, batched or alone, on one rank or on two."""

from __future__ import annotations

import math

import pytest
import torch

import gemoe_ds.evaluation.generate as module
from gemoe_ds.evaluation.fixed_step import FixedStep
from gemoe_ds.evaluation.generate import GenerationStats, _chooser, generate
from gemoe_ds.models.inputs import ModelInputs
from tests.helpers import run_ranks
from tests.models.test_kv_cache import loaded, samples  # noqa: F401  (a fixture)
from tests.tiny import make_model, write_base


def by_hand(model, batch, steps, end_ids):
    """One sequence; the whole forward again for every token."""
    ids, answer = batch.input_ids_BS, []
    feature = batch.images.get("feature_BS")
    images, vision = dict(batch.images), batch.is_vision_BS
    for _ in range(steps):
        with torch.no_grad():
            valid = torch.ones_like(ids, dtype=torch.bool)
            hidden = model.hidden(ModelInputs(ids, valid, vision, images))
            token = int(model.backbone.head(model.hf)(hidden[:, -1]).argmax())
        answer.append(token)
        if token in end_ids:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        vision = torch.cat([vision, torch.zeros(1, 1, dtype=torch.bool)], dim=1)
        if feature is not None:
            feature = torch.cat([feature, torch.full((1, 1), -1)], dim=1)
            images["feature_BS"] = feature
    return answer


def test_greedy_answers_are_those_without_a_cache(loaded):  # noqa: F811
    model, collator = loaded
    some = samples(model.image_layout is not None)
    prompts = [collator.prompt(row, sample) for row, sample in enumerate(some)]
    free = [by_hand(model, collator.batch([p]), 8, set()) for p in prompts]
    ends = {free[0][2]}  # one ends early at least
    expected = [by_hand(model, collator.batch([p]), 8, ends) for p in prompts]
    written = generate(model, collator.batch(prompts, left=True), max_new_tokens=8, end_ids=ends)
    assert written.token_ids == expected
    lengths = [len(p.input_ids) for p in prompts]
    assert written.prompts.tokens == sum(lengths)
    # the last token of an answer is written, never read
    assert written.steps.tokens == sum(len(answer) - 1 for answer in expected)
    low, high = model.moe_layers[0].router.k_low, model.moe_layers[0].router.k_high
    for work in (written.prompts, written.steps):
        assert all(low <= k <= high for k in work.mean_k_L) and work.seconds > 0


def test_steps_of_fixed_shape_write_the_same(loaded, monkeypatch):  # noqa: F811
    """What a CUDA graph would hold, run as it is; one sequence ends early and stays there."""
    model, collator = loaded
    some = samples(model.image_layout is not None)
    prompts = [collator.prompt(row, sample) for row, sample in enumerate(some)]
    batch = collator.batch(prompts, left=True)
    free = generate(model, batch, max_new_tokens=8, end_ids=set(), count=False).token_ids
    options = {"max_new_tokens": [8, 6, 8], "end_ids": {free[0][2]}, "count": False}
    want = generate(model, batch, **options).token_ids
    monkeypatch.setattr(module, "why_no_graph", lambda *_, **__: None)
    captured = []
    monkeypatch.setattr(FixedStep, "capture", lambda step: captured.append(step))
    assert generate(model, batch, **options, cuda_graph=True).token_ids == want
    assert (
        len(captured) == 1
        and captured[0].past.is_valid_BP.shape[1] == batch.is_valid_BS.shape[1] + 8
    )


def test_without_a_gpu_a_line_says_so_and_answers_are_written(tmp_path, capsys):
    model = make_model(write_base(tmp_path))
    prompts = fake_prompts(torch.ones(1, 3, dtype=torch.long), [3])
    options = {"max_new_tokens": 3, "end_ids": set(), "count": False}
    want = generate(model, prompts, **options).token_ids
    assert generate(model, prompts, **options, cuda_graph=True).token_ids == want
    said = [line for line in capsys.readouterr().err.splitlines() if "graph" in line]
    assert said == ["no CUDA graph: there are no CUDA graphs on cpu; answers are written without"]


def test_mean_k_is_that_of_the_tokens(tmp_path):
    model = make_model(write_base(tmp_path), "top_k", {"k": 3})
    ids = torch.randint(6, 20, (2, 5))
    batch = fake_prompts(ids, [5, 3])
    written = generate(model, batch, max_new_tokens=4, end_ids=set())
    assert written.prompts.tokens == 8 and written.prompts.mean_k_L == [3.0, 3.0]
    assert written.steps.tokens == 6 and written.steps.mean_k_L == [3.0, 3.0]
    assert [len(answer) for answer in written.token_ids] == [4, 4]
    # prompts of 5 and 3: token i of each sees i; then 3 steps of each see one more every time
    assert written.prompts.attended == (1 + 2 + 3 + 4 + 5) + (1 + 2 + 3)
    assert written.steps.attended == (6 + 7 + 8) + (4 + 5 + 6)


def test_a_low_temperature_sharpens():
    """At 0.5 a lead of 1 counts as 2: the likelier of two tokens has 88 %, not 73 or 62."""
    rows = fake_prompts(torch.zeros(4000, 1, dtype=torch.long), [1] * 4000)
    chosen = _chooser(rows, temperature=0.5, seed=0)(torch.tensor([[0.0, 1.0]]).expand(4000, 2))
    assert chosen.double().mean().item() == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02)


def fake_prompts(ids_BS, lengths):
    from gemoe_ds.data.collate import Batch

    size = ids_BS.shape
    valid = torch.arange(size[1]) >= size[1] - torch.tensor(lengths)[:, None]
    return Batch(
        input_ids_BS=ids_BS,
        labels_BS=torch.full(size, -100),
        is_valid_BS=valid,
        is_vision_BS=torch.zeros(size, dtype=torch.bool),
        turn_BS=torch.full(size, -1, dtype=torch.int16),
        images={},
        ids=tuple(map(str, range(size[0]))),
        rows=tuple(range(size[0])),
    )


def test_sampling_draws_from_the_model(tmp_path):
    """Frequencies of the first token against its probabilities; a seed repeats itself."""
    model = make_model(write_base(tmp_path), "top_k", {"k": 2})
    ids = torch.randint(6, 20, (1, 5)).expand(4000, 5)
    batch = fake_prompts(ids, [5] * 4000)
    options = {"max_new_tokens": 1, "end_ids": set(), "temperature": 2.0}
    drawn = generate(model, batch, seed=1, **options).token_ids
    assert drawn == generate(model, batch, seed=1, **options).token_ids
    assert drawn != generate(model, batch, seed=2, **options).token_ids
    with torch.no_grad():
        hidden = model.hidden(ModelInputs(ids[:1], batch.is_valid_BS[:1], batch.is_vision_BS[:1]))
        probability = (model.backbone.head(model.hf)(hidden[0, -1]) / 2.0).softmax(-1)
    found = torch.bincount(torch.tensor(drawn).flatten(), minlength=len(probability)) / 4000
    assert (found - probability).abs().max() < 5 * 0.5 / 4000**0.5


def write_on_two(rank, base):
    """The ranks share experts; the first has two prompts and writes long, the second ends soon."""
    from gemoe_ds.engine.groups import expert_shard
    from gemoe_ds.engine.world import any_over_ranks, distributed

    ids = torch.randint(6, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    mine = fake_prompts(ids[:2], [5, 4]) if rank == 0 else fake_prompts(ids[2:], [5])
    ends = set() if rank == 0 else set(range(26))
    with distributed() as world:
        model = make_model(base, "gemoe", shard=expert_shard(2, world))
        return generate(
            model,
            mine,
            max_new_tokens=6,
            end_ids=ends,
            any_rank=lambda here: any_over_ranks(here, world.device),
        ).token_ids


def test_ranks_that_share_experts_wait_for_each_other(tmp_path):
    base = write_base(tmp_path)
    first, second = run_ranks(write_on_two, 2, base)
    model = make_model(base, "gemoe")
    ids = torch.randint(6, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    alone = generate(model, fake_prompts(ids, [5, 4, 5]), max_new_tokens=6, end_ids=set())
    assert [len(answer) for answer in first] == [6, 6] and first == alone.token_ids[:2]
    assert second == [alone.token_ids[2][:1]]


def test_the_model_is_left_as_it_was(tmp_path):
    model = make_model(write_base(tmp_path)).train()
    generate(
        model,
        fake_prompts(torch.ones(1, 3, dtype=torch.long), [3]),
        max_new_tokens=2,
        end_ids=set(),
    )
    assert model.training and not model.ctx.trace
    with pytest.raises(IndexError):
        generate(model, fake_prompts(torch.full((1, 3), 99), [3]), max_new_tokens=2, end_ids=set())
    assert model.training and not model.ctx.trace


def test_answers_that_end_at_once_cost_no_step():
    assert GenerationStats().mean_k_L == [0.0]
