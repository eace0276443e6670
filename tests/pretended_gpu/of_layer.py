"""One MoE layer on a pretended GPU: test_pretended_gpu.py starts these in a process of their own.

The oracle is the same layer on the CPU, which its own tests hold to formulas.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gemoe_ds.moe import triton_launch
from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from gemoe_ds.moe.experts import quantised_kernels
from gemoe_ds.moe.experts.module import Experts, QuantisedExperts
from gemoe_ds.moe.experts.quantised import FORMATS, QuantisedWeight
from gemoe_ds.moe.layer import MoELayer
from gemoe_ds.moe.router import Router, RoutingSpec
from tests.pretended_gpu.gpu import CUDA, Gpu, on_gpu, pretended_gpu, real
from tests.routers.cases import TRAIN, case_id

BF16 = torch.bfloat16
SPEC = RoutingSpec(d_model=16, num_experts=8, top_k=4, norm_topk_prob=False)
WIDTH, RANKS = 8, 2
ROUTERS = [(name, {}) for name in Router.names()] + [
    ("gemoe", {"predictor_input": "both", "budget_k": 2.5}),
    ("top_p", {"learn": "layer", "start_k": 2.5}),
    ("dynmoe", {"start_k": "half", "adapt": "both"}),
    ("moepp", {"norm_topk_prob": "sum"}),
]


class Arrived:
    def wait(self) -> None:
        pass


def loopback(output, rows, output_splits, input_splits) -> Arrived:
    """The all-to-all of ranks that all do the same to each other: what goes to rank r is what
    comes from it. So every rank's experts are those of rank 0."""
    assert output_splits == input_splits
    output.copy_(rows)
    return Arrived()


def make_layer(
    router: str, options: dict, *, trainable: bool, ranks: int, here: int, bits: str | None = None
) -> MoELayer:
    """With the experts of `here` of those ranks: all of them hold the same. `bits`: a format."""
    g = torch.Generator().manual_seed(0)
    each = SPEC.num_experts // ranks
    gate_up = torch.randn(each, 2 * WIDTH, SPEC.d_model, generator=g) / 4
    down = torch.randn(each, SPEC.d_model, WIDTH, generator=g) / 3
    weights = [
        w.repeat(here, 1, 1).to(torch.float32 if trainable else BF16) for w in (gate_up, down)
    ]
    torch.manual_seed(1)
    chosen = Router.named(router)
    one = chosen(chosen.Config(**options), SPEC)
    one.adopt_gate(torch.randn(SPEC.num_experts, SPEC.d_model))
    local = here == ranks
    dispatcher = LocalDispatcher() if local else AllToAllDispatcher(loopback, 0, ranks)
    ctx = TokenContext(1)
    ctx.losses_without_gradient = True
    if bits is None:
        experts = Experts(*weights, trainable=trainable)
    else:
        experts = QuantisedExperts(*(QuantisedWeight.of(bits, w.float()) for w in weights))
    layer = MoELayer(one, experts, dispatcher, ctx)
    layer.stands_alone = True
    return layer


def tokens() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(2)
    is_valid = torch.ones(2, 4, dtype=torch.bool)
    is_valid[1, -1:] = False
    is_vision = torch.zeros_like(is_valid)
    is_vision[:, 1:2] = True
    return torch.randn(2, 4, 16, generator=g).to(BF16), is_valid, is_vision


def forward(layer: MoELayer, x, is_valid, is_vision, recompute: bool = False):
    with torch.autocast(x.device.type, BF16):
        torch.manual_seed(3)
        if recompute:
            return checkpoint(layer, x, is_valid, is_vision, use_reentrant=False)
        return layer(x, is_valid, is_vision)


def loss_of(layer: MoELayer, y):
    return y.float().square().sum() + layer.aux_loss()


def on_cpu(layer: MoELayer):
    x, is_valid, is_vision = tokens()
    x.requires_grad_()
    y = forward(layer, x, is_valid, is_vision)
    loss = loss_of(layer, y)
    loss.backward()
    return y, loss, x.grad, gradients(layer)


def gradients(layer: MoELayer) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


def assert_close(ours, theirs, what: str) -> None:
    ours, theirs = real(ours).detach().float(), theirs.detach().float()
    assert ours.shape == theirs.shape, what
    scale = float(theirs.abs().max())
    torch.testing.assert_close(
        ours, theirs, rtol=0, atol=0.02 * scale + 1e-6, msg=lambda m: f"{what}: {m}"
    )


def step(layer: MoELayer, gpu: Gpu, recompute: bool = False):
    """y, loss, the gradient of x; launches and waits of the layer forward, of all backward."""
    x, is_valid, is_vision = on_gpu(tokens())
    x.requires_grad_()
    gpu.forget()
    y = forward(layer, x, is_valid, is_vision, recompute)
    costs = [(gpu.launches.copy(), gpu.waits.copy())]
    loss = loss_of(layer, y)
    gpu.forget()
    loss.backward()
    costs.append((gpu.launches.copy(), gpu.waits.copy()))
    return y, loss, x.grad, costs


def assert_as_on_cpu(layer: MoELayer, found: tuple, wanted: tuple, copies: int = 1) -> None:
    """Of experts that stand for `copies` the sum of what these learn is wanted."""
    for what, ours, theirs in zip(("y", "loss", "gradient of x"), found, wanted, strict=False):
        assert_close(ours, theirs, what)
    of_layer, of_reference = gradients(layer), wanted[-1]
    assert of_layer.keys() == of_reference.keys()
    for name, ours in of_layer.items():
        theirs = of_reference[name]
        if name.startswith("experts"):
            theirs = theirs.view(copies, -1, *theirs.shape[1:]).sum(0)
        assert_close(ours, theirs, name)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("ranks", [1, RANKS], ids=["local", "ep"])
def test_a_step_is_that_of_a_cpu_with_one_wait_and_few_launches(ranks, trainable):
    kind = {"trainable": trainable, "ranks": ranks}
    wanted = on_cpu(make_layer("gemoe", {}, **kind, here=ranks))
    with pretended_gpu(interpret=True) as gpu:
        layer = on_gpu(make_layer("gemoe", {}, **kind, here=1))
        *found, costs = step(layer, gpu)
    assert_as_on_cpu(layer, found, wanted, ranks)
    assert not gpu.mixed and not gpu.uploads
    (launches, waits), (launches_back, waits_back) = costs
    assert (waits.total(), waits_back.total()) == (1, 0), costs
    most, most_back = (90, 50) if ranks == 1 else (165, 60)
    assert launches.total() <= most and launches_back.total() <= most_back, costs
    assert not [name for name in launches + launches_back if "sort" in name], costs


@pytest.mark.parametrize("ranks", [1, RANKS], ids=["local", "ep"])
@pytest.mark.parametrize("bits", FORMATS)
def test_a_step_with_quantised_experts_costs_what_one_with_frozen_ones_does(bits, ranks):
    kind = {"trainable": False, "ranks": ranks}
    wanted = on_cpu(make_layer("gemoe", {}, **kind, here=ranks, bits=bits))
    costs = {}
    for one in (None, bits):
        with pretended_gpu(interpret=one is not None) as gpu:
            layer = on_gpu(make_layer("gemoe", {}, **kind, here=1, bits=one))
            quantised_kernels._levels(CUDA)  # uploaded once
            gpu.uploads.clear()
            *found, costs[one] = step(layer, gpu)
        assert not gpu.mixed and not gpu.uploads
    assert_as_on_cpu(layer, found, wanted, ranks)
    plain, quantised = ([(n.total(), w.total()) for n, w in costs[one]] for one in (None, bits))
    assert quantised == plain, costs
    assert [pass_[0]["_product_kernel"] for pass_ in costs[bits]] == [2, 2]


@pytest.mark.parametrize("bits", FORMATS)
def test_no_wait_while_quantised_experts_answer(bits):
    kind = {"trainable": False, "ranks": 1, "here": 1, "bits": bits}
    wanted = forward(make_layer("gemoe", {}, **kind).eval(), *tokens())
    with pretended_gpu(interpret=True) as gpu, torch.no_grad():
        quantised_kernels._levels(CUDA)
        layer, x = on_gpu(make_layer("gemoe", {}, **kind)).eval(), on_gpu(tokens())
        layer.ctx.losses_without_gradient = False
        gpu.forget()
        gpu.uploads.clear()
        y = forward(layer, *x)
    assert not gpu.waits and not gpu.uploads and not gpu.mixed, (gpu.waits, gpu.uploads)
    assert gpu.launches.total() <= 60, gpu.launches
    assert_close(y, wanted, "y")


@pytest.mark.parametrize("bits", FORMATS)
def test_quantised_experts_without_triton(bits, monkeypatch):
    """One after the other, as on a CPU."""
    kind = {"trainable": False, "ranks": 1, "here": 1, "bits": bits}
    wanted = on_cpu(make_layer("gemoe", {}, **kind))
    monkeypatch.setattr(triton_launch, "triton", None)
    with pretended_gpu() as gpu:
        layer = on_gpu(make_layer("gemoe", {}, **kind))
        *found, costs = step(layer, gpu)
    assert_as_on_cpu(layer, found, wanted)
    assert not gpu.mixed and not sum(launches["_product_kernel"] for launches, _ in costs)


@pytest.mark.parametrize("ranks", [1, RANKS], ids=["local", "ep"])
def test_float32_has_one_wait_too(ranks):
    """Experts one after the other, each with as many rows as the host has been told."""
    kind = {"trainable": True, "ranks": ranks}
    x = tokens()[0].float()
    wanted = make_layer("gemoe", {}, **kind, here=ranks)(x)
    with pretended_gpu() as gpu:
        layer = on_gpu(make_layer("gemoe", {}, **kind, here=1))
        gpu.forget()
        y = layer(on_gpu(x))
        loss_of(layer, y).backward()
    assert gpu.waits.total() == 1 and not gpu.mixed, (gpu.waits, gpu.mixed)
    assert_close(y, wanted, "y")


def test_float32_rows_travel_as_autocast_has_them():
    """CUDA's autocast has LayerNorm give float32: the experts would round the rows anyway."""
    kind = {"trainable": True, "ranks": RANKS}
    _, *masks = tokens()
    x = tokens()[0].float()
    wanted = forward(make_layer("gemoe", {}, **kind, here=RANKS), x, *masks)
    with pretended_gpu():
        layer = on_gpu(make_layer("gemoe", {}, **kind, here=1))
        y = forward(layer, *on_gpu((x, *masks)))
    assert y.dtype == torch.float32
    assert_close(y, wanted, "y")
    traffic = layer.dispatcher.traffic
    assert traffic.row_bytes == 2 * traffic.rows * SPEC.d_model * BF16.itemsize > 0


@pytest.mark.parametrize(
    "ranks, dense", [(1, False), (RANKS, False), (1, True)], ids=["local", "ep", "dense gradient"]
)
def test_nothing_stays_alive_after_a_step(ranks, dense):
    kind = {"trainable": True, "ranks": ranks}
    reference = make_layer("gemoe", {}, **kind, here=ranks)
    reference.dense_gradient = dense
    wanted = on_cpu(reference)
    gc.disable()  # a cycle through a graph's nodes would be collected on some day, or never
    alive = []
    with pretended_gpu() as gpu:
        layer = on_gpu(make_layer("gemoe", {}, **kind, here=1))
        layer.dense_gradient = dense
        for recompute in (True, True, False):
            layer.zero_grad()
            *found, costs = step(layer, gpu, recompute)
            assert_as_on_cpu(layer, found, wanted, ranks)
            parts = 2 * dense  # of the experts that are not chosen, each has its wait
            waits = [waits.total() for _, waits in costs]
            assert waits == [1, int(recompute) + parts], costs
            del found
            alive.append(gpu.alive())
    gc.enable()
    assert alive[0] == max(alive), alive


@pytest.mark.parametrize(
    "router", [("top_k", {}), ("top_k", {"k": 2}), ("evolve", {})], ids=case_id
)
def test_no_wait_where_shapes_say_the_number_of_assignments(router):
    name, options = router
    x = tokens()[0]
    wanted = make_layer(name, options, trainable=False, ranks=1, here=1)(x)
    with pretended_gpu() as gpu:
        layer = on_gpu(make_layer(name, options, trainable=False, ranks=1, here=1))
        y = layer(on_gpu(x))
        assert not gpu.waits and not gpu.uploads and not gpu.mixed
    assert_close(y, wanted, "y")


@pytest.mark.parametrize("case", ROUTERS, ids=case_id)
def test_no_wait_while_an_answer_is_written(case):
    """Nothing that the host does depends on what the device found: a CUDA graph can hold it."""
    kind = {"trainable": False, "ranks": 1, "here": 1}
    wanted, x = make_layer(*case, **kind).eval(), tokens()
    with pretended_gpu(interpret=case == ("gemoe", {})) as gpu, torch.no_grad():
        layer, x_gpu = on_gpu(make_layer(*case, **kind)).eval(), on_gpu(x)
        wanted.ctx.losses_without_gradient = layer.ctx.losses_without_gradient = False
        for padded in (1, 0):  # as they come, and all of them
            gpu.forget()
            y = forward(layer, x_gpu[0], x_gpu[1] * padded, x_gpu[2])
            assert not gpu.waits and not gpu.uploads and not gpu.mixed, (gpu.waits, gpu.uploads)
            assert_close(y, forward(wanted, x[0], x[1] * padded, x[2]), "y")
    assert case != ("gemoe", {}) or gpu.launches.total() <= 60, gpu.launches


@pytest.mark.parametrize("ranks", [1, RANKS], ids=["local", "ep"])
def test_tokens_without_experts(ranks):
    """All padding, as on an idle rank: products never see a matrix without rows."""
    with pretended_gpu() as gpu:
        layer = on_gpu(make_layer("gemoe", {}, trainable=True, ranks=ranks, here=1))
        x, is_valid, is_vision = on_gpu(tokens())
        x.requires_grad_()
        y = forward(layer, x, torch.zeros_like(is_valid), is_vision)
        loss_of(layer, y).backward()
        assert not gpu.launches["_grouped_mm"]
    assert not real(y).any() and not real(x.grad).any()
    assert not any(real(grad).any() for grad in gradients(layer).values())


@pytest.mark.parametrize("case", ROUTERS, ids=case_id)
def test_every_router(case):
    name, options = case
    kind = {"trainable": name in TRAIN, "ranks": 1, "here": 1}
    wanted = on_cpu(make_layer(name, options, **kind))
    with pretended_gpu() as gpu:
        layer = on_gpu(make_layer(name, options, **kind))
        if any(name.startswith("is_") for name, _ in layer.router.named_buffers()):
            step(layer, gpu)  # asks the device once for what it remembers from then on
            layer.zero_grad()
        *found, costs = step(layer, gpu)
    assert_as_on_cpu(layer, found, wanted)
    assert not gpu.mixed and not gpu.uploads, (gpu.mixed, gpu.uploads)
    assert [waits.total() for _, waits in costs] == [1, 0], [waits for _, waits in costs]
