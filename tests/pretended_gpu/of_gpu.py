"""What the pretended GPU counts, by hand: test_pretended_gpu.py starts these in a process of their
own."""

from __future__ import annotations

import pytest
import torch

from tests.pretended_gpu.gpu import Pretended, on_gpu, pretended_gpu

# What is done with x [3, 4] and its mask, and how often the host waits, copies to the device, and
# has an operand on the wrong device.
CASES = {
    "sum": (lambda x, m: x.sum(), (0, 0, 0)),
    "item": (lambda x, m: x.sum().item(), (1, 0, 0)),
    "if": (lambda x, m: 1 if m.any() else 2, (1, 0, 0)),
    "tolist": (lambda x, m: x.tolist(), (1, 0, 0)),
    "to the host": (lambda x, m: x.cpu(), (1, 0, 0)),
    "nonzero": (lambda x, m: m.nonzero(), (1, 0, 0)),
    "nonzero_static": (lambda x, m: torch.nonzero_static(m, size=2), (0, 0, 0)),
    "read by a mask": (lambda x, m: x[m], (1, 0, 0)),
    "written by a mask": (lambda x, m: x.masked_fill(m, 0.0), (0, 0, 0)),
    "a number by a mask": (lambda x, m: x.clone().__setitem__(m, 0.0), (0, 0, 0)),
    "numbers by a mask": (lambda x, m: x.clone().__setitem__(m, x[0, :2]), (1, 0, 0)),
    "unique": (lambda x, m: x.unique(), (1, 0, 0)),
    "bincount": (lambda x, m: torch.bincount(m.flatten().long()), (1, 0, 0)),
    "repeats": (lambda x, m: x[0].repeat_interleave(m[0].long()), (1, 0, 0)),
    "known repeats": (
        lambda x, m: x[0].repeat_interleave(m[0].long(), output_size=2),
        (0, 0, 0),
    ),
    "multinomial": (lambda x, m: torch.multinomial(x.abs(), 1), (1, 0, 0)),
    "by a list": (lambda x, m: x[:, [0, 2]], (0, 1, 0)),
    "from a list": (lambda x, m: x * torch.tensor([1.0, 2, 3, 4], device="cuda"), (0, 1, 0)),
    "from the host": (lambda x, m: x + torch.ones(4).to("cuda"), (0, 1, 0)),
    "a number of the host": (lambda x, m: x + torch.tensor(2.0), (0, 0, 0)),
    "an operand of the host": (lambda x, m: x + torch.ones(4), (0, 0, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_waits_copies_and_operands(name):
    operation, counts = CASES[name]
    x = torch.arange(12.0).view(3, 4)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, :2] = True
    with pretended_gpu() as gpu:
        operation(*on_gpu((x, mask)))
        found = [counter.total() for counter in (gpu.waits, gpu.uploads, gpu.mixed)]
    assert tuple(found) == counts, (gpu.waits, gpu.uploads, gpu.mixed)


def test_launches_memory_and_the_backward_pass():
    with pretended_gpu() as gpu:
        x = on_gpu(torch.ones(3, 4)).requires_grad_()
        y = (x.view(4, 3).t() * 2.0).exp()
        assert gpu.launches.total() == 2 and y.device.type == "cuda"
        assert isinstance(y, Pretended) and y.host.device.type == "cpu"
        y.sum().backward()
        assert x.grad.tolist() == (2 * torch.ones(3, 4).mul(2).exp()).tolist()
        held = gpu.alive()
        del y
        assert gpu.alive() < held
