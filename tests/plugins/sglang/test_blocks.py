"""A block with our routing put in gives what the block of training gives, and what does not fit is
refused.

`Block` has the names that SGLang 0.5.23 gives the parts of a MoE block (read, not run), and asks
`custom_routing_function` as its `select_experts` does.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gemoe_ds.moe.context import TokenContext
from tests.plugins.vllm.described import make_described
from tests.routers.cases import SPEC

D, E, K = SPEC.d_model, SPEC.num_experts, SPEC.top_k


class Block(nn.Module):
    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.topk = nn.Identity()
        self.topk.topk_config = SimpleNamespace(
            top_k=top_k,
            output_format=None,
            num_shared_topk_slots=0,
            custom_routing_function=None,
            use_grouped_topk=True,
            correction_bias=torch.ones(E),
            renormalize=True,
            routed_scaling_factor=2.5,
        )
        self.experts = nn.Parameter(torch.randn(E, D, D))

    def forward(self, x_TD):
        logits, _ = self.gate(x_TD)
        config = self.topk.topk_config
        weights_TK, ids_TK = config.custom_routing_function(
            hidden_states=x_TD,
            gating_output=logits,
            topk=config.top_k,
            renormalize=config.renormalize,
        )
        assert ids_TK.shape == (len(x_TD), config.top_k) and ids_TK.dtype == torch.int32
        each_TKD = torch.einsum("td,tkdf->tkf", x_TD, self.experts[ids_TK.long()])
        return (each_TKD * weights_TK[..., None]).sum(1)


class Model(nn.Module):
    """The first layer is dense, as in `make_described`."""

    def __init__(self, top_k: int = K, blocks: int = 2) -> None:
        super().__init__()
        layers = [nn.ModuleDict({"mlp": nn.Linear(D, D)})]
        layers += [nn.ModuleDict({"mlp": Block(top_k)}) for _ in range(blocks)]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def block(self, layer: int) -> Block:
        return self.model["layers"][layer]["mlp"]


def routings(described, tensors, slots="fold"):
    from gemoe_sglang._served import described as served
    from gemoe_sglang._served.options import Options
    from gemoe_sglang._served.routing import Routing, ServedContext

    routers = served.make_routers(described, Options())
    served.load(routers, tensors)
    ctx = ServedContext(len(routers), 64, torch.device("cpu"))
    return {layer: Routing(router, ctx, slots) for layer, router in routers.items()}


@pytest.mark.parametrize("slots", ["fold", "zero"])
@pytest.mark.parametrize("name", ["gemoe", "top_k", "score", "entropy", "top_p", "zeda"])
def test_a_block_gives_what_the_block_of_training_gives(name, slots):
    from gemoe_sglang.blocks import install

    described, tensors, routers = make_described(name, {})
    model = Model(max(K, min(E, max(router.max_k for router in routers))))
    install(model, routings(described, tensors, slots))
    x_TD = torch.randn(33, D)
    ctx = TokenContext(len(routers))
    valid_BS = torch.ones(1, 33, dtype=torch.bool)
    ctx.begin(valid_BS, torch.zeros_like(valid_BS))
    with torch.no_grad():
        for slot, router in enumerate(routers):
            block = model.block(slot + 1)
            decision, logits_TE = router.decide(x_TD, ctx)
            router.record(decision, logits_TE, ctx)
            mask_TE, _ = router.split(decision.mask_TE)
            weights_TE, _ = router.split(decision.weights_TE)
            dense_TED = torch.einsum("td,edf->tef", x_TD, block.experts)
            expected = (dense_TED * (weights_TE * mask_TE)[..., None]).sum(1)
            torch.testing.assert_close(block(x_TD), expected, rtol=1e-4, atol=1e-4)
            if name == "gemoe":
                assert mask_TE.sum(1).unique().numel() > 1, "k varies, else nothing is shown"


def refused(model, described, tensors):
    from gemoe_sglang._gemoe.errors import ConfigError
    from gemoe_sglang.blocks import install

    with pytest.raises(ConfigError) as refusal:
        install(model, routings(described, tensors))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_what_does_not_fit_is_refused_in_a_line():
    described, tensors, _ = make_described("gemoe", {})
    assert "MoE blocks in layers [1]; export" in refused(Model(blocks=1), described, tensors)
    words = refused(Model(top_k=K - 1), described, tensors)
    assert f"a token may use {K} experts, and SGLang builds its experts for {K - 1}" in words
    model = Model()
    model.block(2).topk.topk_config.output_format = SimpleNamespace(name="BYPASSED")
    words = refused(model, described, tensors)
    assert "layer 2: this MoE backend takes its routing as BYPASSED" in words
    model = Model()
    model.block(1).topk.topk_config.num_shared_topk_slots = 2
    assert "--disable-shared-experts-fusion" in refused(model, described, tensors)


def test_options_name_what_sglang_calls_them():
    from gemoe_sglang._gemoe.errors import ConfigError
    from gemoe_sglang._served.options import Options

    with pytest.raises(ConfigError, match="^--json-model-override-args: gemoe_options.slots='x'"):
        Options.of({"gemoe": {"slots": "x"}})


def test_the_stock_model_gets_neither_gates_nor_routers():
    from gemoe_sglang._served.described import others

    weight = torch.zeros(1)
    names = [
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.0.gate_proj.weight",
        "0.gate.weight",
        "model.norm.weight",
    ]
    kept = [name for name, _ in others([(name, weight) for name in names], {1})]
    assert kept == [names[0], names[2], names[4]], "layer 0 has no routing of ours"
