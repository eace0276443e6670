"""model.compile=dense: what eager gives, in one compilation for every length."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from gemoe_ds.config.load import config_from_dict
from gemoe_ds.config.validate import validate_run
from gemoe_ds.engine.compile import check_compiler, compile_dense
from gemoe_ds.errors import ConfigError
from tests.engine.parity import FLOAT32_BOUND, Case, is_equal, references, run_cases, run_config
from tests.helpers import run_ranks
from tests.tiny import make_model, random_batch

REGIONS = ["self_attn", "input_layernorm", "post_attention_layernorm"]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def step(model, optimizer, batch):
    optimizer.zero_grad()
    loss = model(**batch)["loss"]
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.trainable().items() if p.grad is not None}
    optimizer.step()
    return {"loss": loss.detach()} | grads


def check(base, recompute, backend, rounding=1.0):
    pair = [
        make_model(base, train="all", activation_checkpointing=recompute).train() for _ in range(2)
    ]
    names = compile_dense(pair[1], backend)
    layers = "hf.model.language_model.layers"
    assert set(names) == {"hf.model.vision_tower.encoder.layers.0"} | {
        f"{layers}.{n}.{region}" for n in range(2) for region in REGIONS
    }
    assert pair[0].state_dict().keys() == pair[1].state_dict().keys()
    optimizers = [torch.optim.AdamW(m.trainable().values(), lr=1e-2, eps=1e-3) for m in pair]
    graphs = []
    for seed, length in enumerate((14, 17, 11)):
        batch = random_batch(seed, batch=2 + seed, length=length)
        want, found = (step(m, o, batch) for m, o in zip(pair, optimizers, strict=True))
        assert want.keys() == found.keys() and len(want) > 20
        for name, value in want.items():
            bound = rounding * FLOAT32_BOUND * max(float(value.abs().max()), 1e-3)
            assert (found[name] - value).abs().max() <= bound, name
        graphs.append(counters["stats"]["unique_graphs"])
    # No length has one of its own, and two layers share theirs.
    assert 3 <= graphs[0] <= 5 and graphs[-1] == graphs[0]


def test_losses_and_gradients_are_those_of_eager_mode(base):
    check(base, True, "eager")  # graphs without the compiler, which takes a minute


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_so_they_are_with_the_compiler(base, recompute):
    check(base, recompute, "inductor", rounding=2.0)  # its sums have another order: 1.1 on AVX-512


def test_a_copy_has_regions_of_its_own(base):
    model = make_model(base)
    compile_dense(model, "eager")
    twin = copy.deepcopy(model)
    before, after = (m.hf.model.language_model.layers[0].self_attn for m in (model, twin))
    assert before.forward.__self__ is before and after.forward.__self__ is after


def test_what_cannot_be_compiled_is_refused_in_a_line(base, monkeypatch):
    with pytest.raises(ConfigError, match="compile=dense: ZeRO 3 .* or take ZeRO 2"):
        validate_run(run_config(base, Case(3, compile="dense")), 1, inputs_are_here=False)
    config = run_config(base, Case(2)).model_dump(mode="json")
    config["model"]["compile"] = "all"
    with pytest.raises(ConfigError, match="model.compile.*'none' or 'dense'"):
        config_from_dict(config)
    check_compiler(torch.device("cpu"))
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(ConfigError, match=r"compile=dense: .*C\+\+ compiler.*or set none"):
        check_compiler(torch.device("cpu"))


@pytest.mark.slow  # the compiler takes minutes
def test_two_ranks_equal_the_reference(base):
    cases = [
        Case(2, ep_size=2, accumulation=2, recompute=True, compile="dense"),
        Case(0, ep_size=2, train="all", compile="dense"),
    ]
    expected = references(base, cases, 2)
    for results in run_ranks(run_cases, 2, base, cases, expected, timeout=900):
        for case, errors in zip(cases, results, strict=True):
            assert is_equal(case, errors), f"{case}: {errors}"
