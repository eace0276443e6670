"""Micro-batches reach the device whole and in order; the next one is under way beside the first."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gemoe_ds.data.collate import Batch
from gemoe_ds.engine.feed import on_device


def batch(number: int) -> Batch:
    ids_BS = torch.full((2, 3), number)
    none_BS = torch.zeros(2, 3, dtype=torch.bool)
    pixels = {"pixels": torch.full((1, 4), float(number))}
    return Batch(ids_BS, ids_BS, ~none_BS, none_BS, ids_BS.short(), pixels, ("a", "b"), (0, 1))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_on_a_cpu_they_pass(count):
    given = [batch(n) for n in range(count)]
    for before, after in zip(given, on_device(given, torch.device("cpu")), strict=True):
        for one, other in zip(before.tensors(), after.tensors(), strict=True):
            assert one is other


def test_pinned_is_every_tensor_that_the_model_takes(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 0)
    given = batch(5)
    pinned = given.pinned()
    for one, other in zip(given.tensors(), pinned.tensors(), strict=True):
        assert one is not other and torch.equal(one, other)
    assert replace(pinned, **vars(given)) == given


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_the_next_is_sent_before_one_is_used(monkeypatch, count):
    """The order of what a GPU is asked, without one."""
    said: list[str] = []
    monkeypatch.setattr(Batch, "to", lambda self, _: said.append(f"send {self.n}") or self)
    monkeypatch.setattr(
        Batch, "n", property(lambda self: int(self.input_ids_BS[0, 0])), raising=False
    )
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)

    def record_event():
        sent = said[-1].split()[1]
        return f"event {sent}"

    @contextmanager
    def stream(_):
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: SimpleNamespace(record_event=record_event))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    current = SimpleNamespace(wait_event=lambda event: said.append(f"wait for {event}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    for one in on_device([batch(n) for n in range(count)], torch.device("cuda", 0)):
        said.append(f"use {one.n}")
    want = [["send 0"]] if count else []
    for n in range(count):
        more = [f"send {n + 1}"] if n + 1 < count else []
        want.append([*more, f"wait for event {n}", f"use {n}"])
    assert said == [word for words in want for word in words]
