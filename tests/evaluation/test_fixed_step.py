"""What stands against a CUDA graph of the steps, each told in a line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

import gemoe_ds.evaluation.fixed_step as module
from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.fixed_step import FixedStep, why_no_graph
from gemoe_ds.evaluation.generate import one_token
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.kv_cache import DecodeState
from gemoe_ds.models.shard import ExpertShard
from tests.tiny import make_model, write_base


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = write_base(tmp_path_factory.mktemp("tiny"))
    return make_model(base, "top_k", {"k": 4}, dtype=torch.bfloat16).eval()


@pytest.fixture
def on_gpu(monkeypatch):
    """As far as the reasons are concerned."""
    cuda = SimpleNamespace(type="cuda", __str__=lambda self: "cuda:0")
    parameters = type("Parameters", (), {"device": cuda})()
    monkeypatch.setattr(module, "available", lambda device: True)
    monkeypatch.setattr(
        module,
        "path_for",
        lambda device, *shape: module.grouped if shape[0] == torch.bfloat16 else None,
    )
    return lambda model: monkeypatch.setattr(model, "parameters", lambda: iter([parameters]))


def test_reasons(model, on_gpu, monkeypatch):
    assert why_no_graph(model, 4, recorded=False) == "there are no CUDA graphs on cpu"
    on_gpu(model)
    assert why_no_graph(model, 1024, recorded=False) is None
    assert "counted after every step" in why_no_graph(model, 4, recorded=True)
    assert "1025 sequences may have 4,100 assignments" in why_no_graph(model, 1025, recorded=False)
    monkeypatch.setattr(model, "dtype", torch.float32)
    assert "torch.float32 are multiplied one by one" in why_no_graph(model, 4, recorded=False)
    monkeypatch.setattr(model, "dtype", torch.bfloat16)
    model.hf.set_attn_implementation("eager")
    assert "attention is eager" in why_no_graph(model, 4, recorded=False)
    model.hf.set_attn_implementation("sdpa")
    monkeypatch.setattr(module, "available", lambda device: False)
    assert why_no_graph(model, 4, recorded=False).startswith("Triton is not there")
    monkeypatch.setattr(model, "shard", ExpertShard(num_ranks=2))
    assert "ep_size > 1" in why_no_graph(model, 4, recorded=False)


def read(model) -> tuple[DecodeState, torch.Tensor]:
    past, ids_BS = DecodeState(), torch.randint(6, 20, (2, 5))
    valid_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    valid_BS[1, :2] = False
    logits_BV = model.next_logits(ModelInputs(ids_BS, valid_BS, ~valid_BS & valid_BS, past=past))
    return past, logits_BV.argmax(-1)


def test_a_warm_up_leaves_nothing_behind(model):
    """As `capture` does it: a run that is not to count, and all as it was."""
    past, token_B = read(model)
    step = FixedStep(model, past, 4)
    before = [one.clone() for one in step.past.positions()]
    step.run()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.past.positions(), strict=True))
    step._back_to(before)
    valid_B = torch.tensor([True, True])
    for _ in range(4):
        want = model.next_logits(one_token(token_B, valid_B, past))
        got = step(token_B, valid_B)
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
        token_B = want.argmax(-1)


def test_a_cache_that_moves_is_refused(model):
    past, _ = read(model)
    past.cache.layers[0] = DynamicSlidingWindowLayer(sliding_window=4)
    with pytest.raises(ConfigError, match="its past in a DynamicSlidingWindowLayer, whose size"):
        FixedStep(model, past, 4)
