"""What inference costs, from counts and seconds that are given."""

from __future__ import annotations

import numpy as np
import pytest

from gemoe_ds.evaluation.generate import GenerationStats
from gemoe_ds.evaluation.throughput import Cost, as_markdown
from gemoe_ds.models.cost.flops import flops_per_token
from tests.tiny import SHAPE, make_model, write_base


def test_a_cost_by_hand(tmp_path):
    """Two samples of 20 tokens together, which 5 steps continue, in three rounds."""
    model = make_model(write_base(tmp_path))
    prompts = GenerationStats(20, 9.0, 105, np.array([40, 80]))
    steps = GenerationStats(5, 9.0, 60, np.array([5, 20]))
    rounds = [(2.0, 1.0), (4.0, 8.0), (8.0, 2.0)]
    cost = Cost.of("one", model, prompts, steps, 2, rounds, 10**9)
    assert (cost.samples, cost.prompt_tokens, cost.written_tokens) == (2, 20, 5 + 2)
    assert (cost.mean_k_prompts, cost.mean_k_written) == (3.0, 2.5)
    assert cost.prompt_tokens_per_s == 20 / 4 and cost.written_tokens_per_s == 5 / 2
    assert cost.seconds_per_sample == 5.0 and cost.seconds_per_sample_by_round == [1.5, 6.0, 5.0]
    of_expert = 3 * SHAPE["hidden_size"] * SHAPE["expert_width"]
    idle = (8 - 45 / 25) + (8 - 100 / 25)  # of each layer, over all 25 tokens
    assert cost.activated_parameters == round(model.num_parameters - idle * of_expert)
    for found, mean_k, context in (
        (cost.gflops_per_prompt_token, [2.0, 4.0], 105 / 20),
        (cost.gflops_per_written_token, [1.0, 4.0], 12.0),
    ):
        assert found == pytest.approx(sum(flops_per_token(model, mean_k, context).values()) / 1e9)
    twice = Cost.of("two", model, prompts, GenerationStats(), 2, [(20.0, 0.0)], 2 * 10**9)
    assert twice.written_tokens_per_s == twice.gflops_per_written_token == 0
    *_, first, second = as_markdown([cost, twice]).splitlines()
    assert first.endswith("| 5 | 1.000 |") and second.endswith("| 10 | 2.000 |")
