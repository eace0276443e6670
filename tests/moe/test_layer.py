"""MoELayer.build: equal to every expert on every token; a record that is not meant is refused."""

import copy
import gc
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.context import TokenContext
from gemoe_ds.moe.layer import MoELayer
from gemoe_ds.moe.router import Router
from tests.moe.layers import SIZES, build, tokens
from tests.moe.oracle import dense_moe

SHAPES = [(2, 5), (7,), (), (2, 3, 4), (0, 5), (3, 0)]


def dense(layer: MoELayer, x, is_valid=None, is_vision=None):
    """(y, auxiliary loss) of every expert on every token, and a context made by hand."""
    lead = x.shape[:-1]
    ones = torch.ones(lead, dtype=torch.bool)
    is_valid = ones if is_valid is None else is_valid
    is_vision = ~ones if is_vision is None else is_vision
    length = lead[-1] if lead else 1
    ctx = TokenContext(1)
    ctx.begin(*(mask.reshape(lead[:-1].numel(), length) for mask in (is_valid, is_vision)))
    x_TD = torch.where(is_valid[..., None], x, 0.0).reshape(-1, 16)
    router = layer.router
    decision, logits_TE = router.decide(x_TD, ctx)
    mask_TE, weights_TE = (router.split(t)[0] for t in (decision.mask_TE, decision.weights_TE))
    y_TD = dense_moe(x_TD, mask_TE, weights_TE, layer.experts.gate_up_EGD, layer.experts.down_EDF)
    free_TD = router.free_output(x_TD, decision)
    terms = router.losses(decision, logits_TE, ctx).values()
    aux = sum((term.weight * term.value for term in terms), torch.zeros(()))
    return (y_TD if free_TD is None else y_TD + free_TD).view(x.shape), aux


def gradients(loss, layer, x):
    given = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)


def masks(kind: str, lead):
    g = torch.Generator().manual_seed(3)
    if kind == "none":
        return {}
    share = {"ragged": 0.6, "all_invalid": 0.0}[kind]
    return {
        "is_valid": torch.rand(lead, generator=g) < share,
        "is_vision": torch.rand(lead, generator=g) < 0.5,
    }


@pytest.mark.parametrize("kind", ["none", "ragged", "all_invalid"])
@pytest.mark.parametrize("name", Router.names())
def test_equals_the_dense_layer(name, kind):
    layer = build(name)
    for lead in SHAPES if name == "gemoe" else SHAPES[::3]:
        x, given = tokens(*lead), masks(kind, lead)
        y, aux = layer(x, **given), layer.aux_loss()
        want_y, want_aux = dense(layer, x, **given)
        assert y.shape == x.shape and aux.shape == () and aux.dtype == torch.float32
        torch.testing.assert_close(y, want_y)
        torch.testing.assert_close(aux, want_aux)
        k = layer.k
        assert k.shape == x.shape[:-1] and not k[~given.get("is_valid", k >= 0)].any()
        for found, want in zip(
            gradients(y.square().sum() + aux, layer, x),
            gradients(want_y.square().sum() + want_aux, layer, x),
            strict=True,
        ):
            torch.testing.assert_close(found, want)


def test_a_token_may_have_no_expert_at_all():
    layer = build(k_low=0, k_shift=-9.0, router="gemoe")
    x = tokens(2, 5)
    y = layer(x)
    assert not layer.k.any() and not y.any()
    (y.sum() + layer.aux_loss()).backward()
    assert layer.router.eap.weight.grad.any() and not layer.experts.down_EDF.grad.any()


def test_all_trains_unless_the_method_says_otherwise():
    assert all(p.requires_grad for p in build("gemoe").parameters())
    assert not build("ada_k").router.gate.weight.requires_grad  # the paper's


def test_padding_may_hold_nan():
    layer, x = build(), tokens(2, 5).detach()
    x[0, 3:] = torch.nan
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])  # an attention mask
    y = layer(x, is_valid=valid)
    assert y.isfinite().all() and layer.aux_loss().isfinite() and not y[0, 3:].any()


class Model(torch.nn.Module):
    """Two layers with a residual each, recomputed or not."""

    def __init__(self, recompute: bool, router="gemoe", within=False) -> None:
        super().__init__()
        self.moes = torch.nn.ModuleList([build(router, 0), build(router, 1)])
        self.recompute, self.within = recompute, within

    def block(self, moe, x, valid):
        y = x.tanh() + moe(x.sin(), is_valid=valid)
        return (y, moe.aux_loss()) if self.within else y

    def forward(self, x, valid=None):
        self.aux = []
        for moe in self.moes:
            if self.recompute:
                x = checkpoint(self.block, moe, x, valid, use_reentrant=False)
            else:
                x = self.block(moe, x, valid)
            if self.within:
                x, aux = x
                self.aux.append(aux)
        if not self.within:
            self.aux = [moe.aux_loss() for moe in self.moes]
        return x


VALID = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()


@pytest.mark.parametrize("within", [False, True], ids=["asked_after", "asked_within"])
@pytest.mark.parametrize("name", ["gemoe", "moepp", "dynmoe"])
def test_recomputation_changes_nothing(name, within):
    """Two forwards of equal shape before one backward pass, with other padding; others between."""
    found = []
    for recompute in (False, True):
        model = Model(recompute, name, within)
        x1, x2 = tokens(2, 5), tokens(2, 5, seed=2)
        losses = []
        for x, valid in ((x1, VALID), (x2, ~VALID)):
            losses.append(model(x, valid).square().sum() + sum(model.aux))
            with torch.no_grad():
                model.eval()(x + 1)
                model.train()
        sum(losses).backward()
        found.append([x1.grad, x2.grad, *(p.grad for p in model.parameters())])
        assert sum(losses).requires_grad and found[0][2] is not None
    for plain, again in zip(*found, strict=True):
        assert (plain is None) == (again is None)
        assert plain is None or torch.equal(plain, again)


def test_evaluation_gives_the_value_alone():
    layer, x = build(), tokens(2, 5)
    layer(x)
    want = layer.aux_loss()
    with torch.no_grad():
        layer(x)
        assert torch.equal(layer.aux_loss(), want) and not layer.aux_loss().requires_grad
    assert torch.equal(layer.eval()(x), layer(x)) and torch.equal(layer.aux_loss(), want)


def test_a_second_forward_of_equal_shape_has_its_own_losses():
    layer = build()
    first, second = tokens(2, 5), tokens(2, 5, seed=2)
    y = layer(first)
    one = layer.aux_loss()
    assert layer.aux_loss() == one  # again, for the log
    y = layer(second)
    assert layer.aux_loss() != one
    assert torch.equal(layer.aux_loss(), dense(layer, second)[1])
    y.sum().backward()


def test_a_stale_record_is_refused():
    layer, x = build(), tokens(2, 5)
    with pytest.raises(RuntimeError, match="has not run; call aux_loss.. once after every"):
        layer.aux_loss()
    with pytest.raises(RuntimeError, match="has not run yet"):
        layer.k  # noqa: B018
    y = layer(x)
    (y.sum() + layer.aux_loss()).backward()
    del y
    with pytest.raises(RuntimeError, match="has had its backward pass"):
        layer.aux_loss()
    with torch.no_grad():
        layer(x)
    with pytest.raises(RuntimeError, match="without gradients.*use_reentrant=False"):
        layer.aux_loss()
    layer(x)  # its output is dropped: nothing is lost
    gc.collect()
    y1 = layer(x)
    with torch.no_grad():
        layer.aux_loss()  # a value for the log trains nothing
    y2 = layer(x)
    with torch.no_grad():
        assert layer.aux_loss() > 0
    with pytest.raises(RuntimeError, match="1 earlier forward.*not asked"):
        layer.aux_loss()
    del y1
    (y2.sum() + layer.aux_loss()).backward()
    layer.eval()(x)
    layer.train()(x)
    assert layer.aux_loss() > 0  # what ran in eval() does not count


def test_a_forward_that_failed_has_no_record():
    layer = build()
    layer(tokens(2, 5))
    layer.shared = lambda x: x @ x
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(tokens(2, 5))
    with pytest.raises(RuntimeError, match="has not run"):
        layer.aux_loss()


def test_reentrant_recomputation_loses_no_loss_silently():
    layer, x = build(), tokens(2, 5)
    y = checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        layer.aux_loss()
    y.sum().backward()
    plain = x.grad.clone()
    x.grad = None
    layer(x).sum().backward()
    assert torch.equal(plain, x.grad)


def test_a_copy_has_a_record_of_its_own():
    layer, x = build(), tokens(2, 5)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(RuntimeError, match="has not run"):
            other.aux_loss()
        assert torch.equal(other(x), y) and other.aux_loss() == layer.aux_loss()
    other.load_state_dict(layer.state_dict(), strict=True)


@pytest.mark.parametrize("name", Router.names())
def test_bfloat16_layers_route_in_float32(name):
    layer = build(name).to(torch.bfloat16)
    x = tokens(2, 5).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16 and layer.aux_loss().dtype == torch.float32
    assert layer.ctx.layers[0].logits_TE.dtype == torch.float32
    (y.sum() + layer.aux_loss()).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"top_k": 9}, "top_k=9 exceeds num_experts=8"),
        ({"d_ff": 0}, "d_ff=0: a whole number from 1"),
        ({"d_model": 16.0}, "d_model=16.0: a whole number"),
        ({"router": "gemo"}, "'gemo' is not known; known: .*did you mean gemoe"),
        ({"router": int}, "is no router; give a name"),
        ({"k_hihg": 3}, "k_hihg: no such option; router gemoe has .*did you mean k_high"),
        ({"k_high": 2.5}, "router gemoe: k_high=2.5: Input should be a valid integer"),
        ({"k_low": 4}, "leave no k to choose"),
        ({"k_low": 5}, "k_low=5, k_high=4 must satisfy"),
    ],
)
def test_what_no_layer_can_be_is_refused_in_a_line(change, told):
    with pytest.raises(ConfigError, match=told) as refused:
        MoELayer.build(**SIZES | change)
    assert "\n" not in str(refused.value)


def test_input_that_does_not_fit_is_refused():
    layer, x = build(), tokens(2, 5)
    with pytest.raises(ValueError, match=r"shape \[2, 5, 8\]; .*\[\.\.\., 16\]"):
        layer(x[..., :8])
    with pytest.raises(ValueError, match="torch.int64"):
        layer(torch.ones(2, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"is_valid is torch.bool of shape \[5\].*\[2, 5\]"):
        layer(x, is_valid=VALID[0])
    with pytest.raises(ValueError, match="is_vision is torch.float32"):
        layer(x, is_vision=VALID.float())
    shared = MoELayer(layer.router, layer.experts, layer.dispatcher, TokenContext(1))
    with pytest.raises(RuntimeError, match="shares its context.*model"):
        shared(x, is_valid=VALID)
    with pytest.raises(RuntimeError, match="shares its context.*handle.aux_loss"):
        shared.aux_loss()


def test_ada_k_says_when_its_warm_up_is_over():
    layer = build("ada_k", warm_steps=0)
    layer(tokens(2, 5))
    with pytest.raises(RuntimeError, match="rollouts.*gemoe_ds.train"):
        layer.aux_loss()
