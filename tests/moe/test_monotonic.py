"""The O(T log T) monotonic loss equals its O(T^2) definition, in value and gradient."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemoe_ds.moe.monotonic import dominance_counts, monotonic_loss


def definition(entropy, k_soft, slope=1.2, constant=0.0):
    """GeMoE Eq. 12, written down."""
    gap = entropy[:, None] - entropy[None, :]
    hinge = (slope * gap + constant - (k_soft[:, None] - k_soft[None, :])).clamp_min(0)
    pairs = gap > 0
    return (hinge * pairs).sum() / pairs.sum().clamp_min(1)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 60),
    ties=st.sampled_from([0, 1, 3]),
    constant=st.sampled_from([0.0, 0.5]),
    attach=st.booleans(),
)
def test_equals_definition(seed, tokens, ties, constant, attach):
    g = torch.Generator().manual_seed(seed)
    entropy = torch.rand(tokens, generator=g, dtype=torch.float64) * 6
    if ties:
        entropy = (entropy * ties).round() / ties
    k_soft = torch.rand(tokens, generator=g, dtype=torch.float64) * 7 + 1
    results = []
    for function in (monotonic_loss, definition):
        h, k = entropy.clone().requires_grad_(attach), k_soft.clone().requires_grad_()
        loss = function(h, k, slope=1.2, constant=constant)
        loss.backward()
        results.append((loss.detach(), k.grad, h.grad if attach else torch.zeros(0)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 40),
    ties=st.sampled_from([1, 100]),
    share=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_invalid_tokens_form_no_pair(seed, tokens, ties, share):
    g = torch.Generator().manual_seed(seed)
    entropy = (torch.rand(tokens, generator=g, dtype=torch.float64) * 6 * ties).round() / ties
    k_soft = torch.rand(tokens, generator=g, dtype=torch.float64) * 7 + 1
    valid = torch.rand(tokens, generator=g) < share
    h, k = entropy.requires_grad_(), k_soft.requires_grad_()
    have, want = monotonic_loss(h, k, valid), definition(h[valid], k[valid])
    grads = [torch.autograd.grad(loss, [h, k]) for loss in (have, want)]
    for fast, slow in zip((have, *grads[0]), (want, *grads[1]), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(0, 40), levels=st.integers(1, 6))
def test_counts_with_many_ties(seed, tokens, levels):
    g = torch.Generator().manual_seed(seed)
    h, u, v = (torch.randint(levels, (tokens,), generator=g) for _ in range(3))
    dominates = (h[:, None] > h[None, :]) & (u[:, None] > v[None, :])
    below, above = dominance_counts(h, u, v)
    assert below.tolist() == dominates.sum(1).tolist()
    assert above.tolist() == dominates.sum(0).tolist()


def test_zero_iff_k_rises_by_the_margin():
    entropy = torch.linspace(0, 6, 50, dtype=torch.float64)
    assert monotonic_loss(entropy, 1.2 * entropy + 1) < 1e-12
    assert monotonic_loss(entropy, 1.3 * entropy) == 0
    assert monotonic_loss(entropy, 1.1 * entropy) > 0


@pytest.mark.parametrize("sign, bound", [(1, 0.95), (-1, -0.95)])
def test_training_on_it_alone_orders_k_by_entropy(sign, bound):
    """facts: L_mono alone gives Spearman(H, k) > 0.95, reversed < -0.95."""
    from gemoe_ds.moe.losses import spearman

    torch.manual_seed(0)
    x = torch.randn(512, 16)
    entropy = 3 + x @ torch.randn(16) / 4
    predictor = torch.nn.Linear(16, 8, bias=False)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=0.02)
    for _ in range(300):
        k_soft = predictor(x).softmax(-1) @ torch.arange(1.0, 9.0)
        optimizer.zero_grad()
        monotonic_loss(sign * entropy, k_soft).backward()
        optimizer.step()
    rho = spearman(entropy, k_soft)
    assert sign * rho > sign * bound


BIG = """
import resource, sys, time, torch
from gemoe_ds.moe.monotonic import monotonic_loss
torch.set_num_threads(1)
T = int(sys.argv[1])
g = torch.Generator().manual_seed(1)
h = torch.rand(T, generator=g) * 6
k = (torch.rand(T, generator=g) * 7 + 1).requires_grad_()
monotonic_loss(h[:64], k[:64]).backward()
k.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
loss = monotonic_loss(h, k)
loss.backward()
seconds = time.perf_counter() - start
megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
value, grad = 0.0, torch.zeros(T, dtype=torch.float64)
hd, kd = h.double(), k.detach().double()
pairs = 0
for part in torch.arange(T).split(1024):  # the definition, a block of rows at a time
    gap = hd[part, None] - hd[None]
    hinge = 1.2 * gap - (kd[part, None] - kd[None])
    active = (gap > 0) & (hinge > 0)
    value += (hinge * active).sum().item()
    pairs += (gap > 0).sum().item()
    grad[part] -= active.sum(1)
    grad += active.sum(0)
want = torch.tensor(value / pairs, dtype=torch.float64)
torch.testing.assert_close(loss.detach().double(), want, rtol=1e-6, atol=0)
torch.testing.assert_close(k.grad.double(), grad / pairs, rtol=1e-6, atol=1e-12)
print(seconds, megabytes)
"""


@pytest.mark.parametrize("tokens", [8192, pytest.param(32768, marks=pytest.mark.slow)])
def test_many_tokens_exact_fast_and_small(tokens):
    """At most 2 s and 200 MB on one core (measured at 32,768: 0.07 s and 20 MB)."""
    done = subprocess.run(
        [sys.executable, "-c", BIG, str(tokens)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 2
    assert megabytes < 200
