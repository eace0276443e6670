"""Loss and measure functions against hand-computed values and plain definitions."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from gemoe_ds.moe import losses
from gemoe_ds.moe.monotonic import monotonic_loss


def test_entropy_in_bits():
    scores = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0], [1.0, 0, 0, 0]])
    torch.testing.assert_close(losses.entropy_bits(scores), torch.tensor([2.0, 1.0, 0.0]))


def test_entropy_gradient_is_finite_at_zero_scores():
    logits = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    losses.entropy_bits(logits.softmax(-1)).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("k", [1, 3, 8])
def test_balance_is_one_when_balanced_whatever_k(k):
    scores = torch.full((16, 8), 1 / 8)
    mask = torch.stack([torch.roll(torch.arange(8) < k, t) for t in range(16)])
    valid = torch.ones(16, dtype=torch.bool)
    torch.testing.assert_close(losses.load_balance(scores, mask, valid), torch.tensor(1.0))


def test_balance_by_hand_for_a_variable_k():
    # three tokens with k = 2, 1, 0 and one of padding with k = 2: counts (2, 1), P = (0.6, 0.4)
    scores = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5], [0.0, 1.0]], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1]]).bool()
    valid = torch.tensor([True, True, True, False])
    loss = losses.load_balance(scores, mask, valid)
    assert math.isclose(loss.item(), 2 * (2 / 3 * 0.6 + 1 / 3 * 0.4), rel_tol=1e-6)
    loss.backward()
    expected = 2 * torch.tensor([2 / 3, 1 / 3]) / 3
    torch.testing.assert_close(scores.grad[:3], expected.expand(3, 2))
    assert not scores.grad[3].any()


def test_balance_without_any_assignment_is_zero():
    scores = torch.full((4, 2), 0.5)
    none = torch.zeros(4, 2, dtype=torch.bool)
    assert losses.load_balance(scores, none, torch.ones(4, dtype=torch.bool)) == 0
    assert losses.load_balance(scores, ~none, torch.zeros(4, dtype=torch.bool)) == 0


@pytest.mark.parametrize("filling", [torch.nan, torch.inf, 1e30])
def test_padding_may_hold_anything(filling):
    """In value and gradient; a factor of 0 would make NaN of NaN."""
    valid = torch.tensor([True, True, False])
    mask = torch.ones(3, 2, dtype=torch.bool)
    for loss in (
        lambda x: losses.load_balance(x, mask, valid),
        lambda x: monotonic_loss(x[:, 0], x[:, 1], valid),
    ):
        outcomes = []
        for last in (0.5, filling):
            x = torch.tensor([[0.7, 0.3], [0.6, 0.4], [last, last]], requires_grad=True)
            value = loss(x)
            value.backward()
            outcomes.append((value.detach(), x.grad))
        torch.testing.assert_close(*outcomes)


def test_spearman_equals_scipy_with_ties():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(200, generator=g)
    b = torch.randint(1, 9, (200,), generator=g)
    assert math.isclose(losses.spearman(a, b).item(), stats.spearmanr(a, b).statistic, rel_tol=1e-9)
    assert losses.spearman(a, torch.full((200,), 8)) is None
    assert losses.spearman(a[:1], b[:1]) is None
