"""The plugin beside SGLang itself, without a model, a GPU or a kernel of SGLang's.

SGLANG_EXTERNAL_MODEL_PACKAGE=gemoe_sglang.models python with_sglang.py, where both are installed.
"""

import torch
from gemoe_sglang._served import described
from gemoe_sglang._served.options import Options
from gemoe_sglang._served.routing import Routing, ServedContext
from gemoe_sglang.blocks import install
from sglang.srt.layers.moe.topk import TopKConfig, select_experts
from sglang.srt.models.registry import ModelRegistry
from torch import nn

T, D, E, K = 21, 16, 8, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.topk, self.experts = nn.Linear(D, E), nn.Identity(), nn.Identity()
        self.topk.topk_config = TopKConfig(top_k=K, renormalize=True)


def main():
    for name in ("OlmoeForCausalLM", "Qwen3VLMoeForConditionalGeneration"):
        model_class, _ = ModelRegistry.resolve_model_cls([name])
        assert model_class.__module__.startswith("gemoe_sglang.models."), model_class
    spec = {"d_model": D, "num_experts": E, "top_k": K, "norm_topk_prob": False, "num_layers": 1}
    blocks = [{"path": "model.layers.0.mlp", "routing": spec}]
    (router,) = described.make_routers(
        {"router": {"name": "gemoe", "k_low": 1}, "blocks": blocks}, Options()
    ).values()
    torch.manual_seed(0)
    for parameter in router.parameters():
        parameter.data.normal_(0, 0.5)
    ctx = ServedContext(1, 64, torch.device("cpu"))
    model, block = nn.Module(), Block()
    model.layers = nn.ModuleList([nn.ModuleDict({"mlp": block})])
    install(nn.ModuleDict({"model": model}), {0: Routing(router, ctx, "fold")})
    x_TD = torch.randn(T, D)
    logits, _ = block.gate(x_TD)
    chosen = select_experts(x_TD, logits, block.topk.topk_config, layer_id=0)
    found_TE = torch.zeros(T, E).scatter_add_(1, chosen.topk_ids.long(), chosen.topk_weights)
    ctx.take(T, 0)
    decision, _ = router.decide(x_TD, ctx)
    assert torch.equal(found_TE, decision.weights_TE * decision.mask_TE)
    print("k", decision.mask_TE.sum(1).unique().tolist())


main()
