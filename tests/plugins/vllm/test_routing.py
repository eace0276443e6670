"""What vLLM is given is the decision of our own module, for every router that can be served."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gemoe_ds.moe.context import TokenContext
from tests.plugins.vllm.described import make_described
from tests.routers.cases import SPEC, all_variants, case_id

REFUSED = {
    "alloc_moe": "all tokens of the batch",
    "ltdr": "the other vision tokens",
    "evomoe": "one of an image",
}
ONE_KIND = {"copies": 0, "constant": 0, "zero": 3}
CASES = [case for case in all_variants() if case[0] not in {*REFUSED, "moepp"}]
CASES += [
    ("moepp", ONE_KIND),
    ("moepp", ONE_KIND | {"norm_topk_prob": "sum", "k": 6}),
    ("gemoe", {"k_low": 0}),
    ("gemoe", {"k_shift": (-1.0, 0.5), "k_scale": 1.3}),
    ("score", {"threshold": 1.0, "k_low": 0}),  # no expert at all
]


def routings(described, tensors, slots="fold", **options):
    from gemoe_vllm.described import load, make_routers
    from gemoe_vllm.options import Options
    from gemoe_vllm.routing import Routing, ServedContext

    routers = make_routers(described, Options(slots, options))
    load(routers, tensors)
    ctx = ServedContext(len(routers), 8, torch.device("cpu"))
    return [Routing(router, ctx, slots) for router in routers.values()]


def dense(weights_TK, ids_TK, columns):
    """The sum of the weights that each expert gets."""
    total = torch.zeros(len(weights_TK), columns)
    return total.scatter_add_(1, ids_TK.long(), weights_TK)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_slots_hold_the_decision_of_our_own_module(case, scale):
    spec = replace(SPEC, routed_scaling_factor=scale, norm_topk_prob=scale != 1)
    described, tensors, routers = make_described(*case, spec=spec)
    for slots in ("fold", "zero", "ragged", "padding_not_run_on_a_gpu"):
        made = routings(described, tensors, slots)
        for tokens in (5, 11, 0):  # 11: more than the context was made for
            x_TD = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(tokens))
            ctx = TokenContext(2)
            valid = torch.ones(1, tokens, dtype=torch.bool)
            ctx.begin(valid, torch.zeros_like(valid))
            for router, routing in zip(routers, made, strict=True):
                decision, logits_TE = router.decide(x_TD, ctx)
                router.record(decision, logits_TE, ctx)
                expected_TE = torch.where(decision.mask_TE, decision.weights_TE, 0.0)[:, :8]
                mask_TE = decision.mask_TE[:, :8]
                weights_TK, ids_TK = routing(x_TD, None, routing.width, False)
                assert weights_TK.dtype == torch.float32 and ids_TK.dtype == torch.int32
                assert weights_TK.is_contiguous() and ids_TK.is_contiguous()
                assert ids_TK.shape == weights_TK.shape == (tokens, routing.width)
                used_TK = torch.arange(routing.width) < mask_TE.sum(1, keepdim=True)
                assert (weights_TK[~used_TK] == 0).all()
                if slots in ("fold", "zero"):
                    assert ((ids_TK >= 0) & (ids_TK < 8)).all(), "legal in every kernel"
                    found_TE = dense(weights_TK, ids_TK, 8)
                else:
                    nobody = -1 if slots == "ragged" else 8
                    assert ((ids_TK == nobody) == ~used_TK).all()
                    found_TE = dense(weights_TK, ids_TK.where(used_TK, 8), 9)[:, :8]
                assert torch.equal(found_TE, expected_TE)
                if slots == "fold":
                    folded_TK = ids_TK[:, :1].expand_as(ids_TK)[~used_TK]
                    assert torch.equal(ids_TK[~used_TK], folded_TK)


@pytest.mark.parametrize("name", REFUSED)
def test_routers_that_need_more_than_the_token_are_refused(name):
    described, tensors, _ = make_described(name, {})
    with pytest.raises(ValueError, match=f"router {name} cannot be served: .*{REFUSED[name]}"):
        routings(described, tensors)


@pytest.mark.parametrize(
    "router, options, message",
    [
        ({"name": "moepp"}, {}, "moepp with constant, copy experts cannot be served"),
        ({"name": "threshold", "hold": True}, {}, "the tokens before it"),
        ({"name": "later"}, {}, "router 'later' is not known; known: ada_k, "),
        ({"name": "gemoe", "later": 1}, {}, "later: no such option"),
        ({"name": "gemoe"}, {"k_low": 2}, "gemoe.k_low cannot be set .* slots, k_shift, k_scale"),
        ({"name": "top_k"}, {"k_shift": 1}, "gemoe.k_shift cannot be set for router top_k"),
        ({"name": "threshold"}, {"mean_k": -1}, "mean_k=-1: .*must be 0 or more"),
        ({"name": "threshold"}, {"mean_k": [1.0, 2.0, 3.0]}, "3 values for 2 MoE layers"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(router, options, message):
    described, tensors, _ = make_described("gemoe", {})
    with pytest.raises(ValueError, match=message) as refused:
        routings(described | {"router": router}, tensors, **options)
    assert "\n" not in str(refused.value)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, dial, values",
    [
        ("gemoe", "k_shift", (-9, 0, 9)),
        ("gemoe", "k_scale", (0.01, 1, 9)),
        ("mass", "share", (0.0, 0.5, 1.0)),
        ("score", "threshold", (1.0, 0.15, 0.0)),
    ],
)
def test_the_dial_moves_k(name, dial, values):
    described, tensors, _ = make_described(name, {})
    x_TD = torch.randn(50, 16)
    found = []
    for value in values:
        first, _ = routings(described, tensors, **{dial: value})
        found.append((first(x_TD)[0] > 0).sum().item() / 50)
    assert 1 == found[0] < found[1] < found[2] == 4


def test_a_state_that_is_not_whole_is_refused():
    described, tensors, _ = make_described("gemoe", {})
    del tensors["1.eap.weight"]
    with pytest.raises(ValueError, match=r"layer 2: missing \['eap.weight'\], unknown \[\]"):
        routings(described, tensors)


def test_options_of_a_server():
    from gemoe_vllm.options import Options

    assert Options.of(None) == Options.of({"other": 1}) == Options("fold", {})
    given = {"gemoe": {"slots": "ragged", "k_shift": -1}}
    assert Options.of(given) == Options("ragged", {"k_shift": -1})
    with pytest.raises(ValueError, match="gemoe.slots='flod'; give one of fold, zero, ragged"):
        Options.of({"gemoe": {"slots": "flod"}})
    with pytest.raises(ValueError, match="gemoe is 'fold'; give a mapping"):
        Options.of({"gemoe": "fold"})


@torch.no_grad()
def test_a_context_that_grows_keeps_the_layers_below():
    """moepp adds the logits of the layer below, whatever the number of tokens of the last step."""
    described, tensors, routers = make_described("moepp", ONE_KIND)
    first, second = routings(described, tensors)
    x_TD = torch.randn(20, 16)
    first(x_TD)
    one = second(x_TD)
    first(x_TD[:3])
    weights_TE = second(x_TD[:3])[0]
    torch.testing.assert_close(weights_TE, one[0][:3])
    assert torch.equal(weights_TE > 0, one[0][:3] > 0)
