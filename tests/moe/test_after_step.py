"""What routers do between two steps, by hand."""

import warnings

import pytest
import torch

import gemoe_ds.routers  # noqa: F401  (registers every router)
from tests.moe.layers import build, tokens


def test_controllers_work_after_a_step():
    """As the Trainer of gemoe_ds lets them: what they see is summed over the micro-batches."""
    layer = build("remoe", target_k=1.0)
    start = layer.router.coefficient.clone()
    for step in (1, 2):
        for seed in (1, 2):
            (layer(tokens(2, 5, seed=seed)).sum() + layer.aux_loss()).backward()
        layer.eval()(tokens(2, 5))
        layer.train().after_step(step, 2)
    torch.testing.assert_close(layer.router.coefficient, start * 1.2**2)

    layer, x = build("dynmoe"), tokens(2, 5)
    cos_TE = layer.router.gate(x.view(10, 16), layer.router.is_open_E)[1]
    layer(x)
    layer.after_step(1, 10)  # thresholds that give the backbone's k
    want = cos_TE.flatten().sort().values[int((1 - 4 / 8) * 79)]
    torch.testing.assert_close(layer.router.threshold.value_E, want.expand(8))

    layer = build("evolve", beta=((0.0, 0.0),))
    with torch.no_grad():
        layer.experts.down_EDF[0] += 1
    before = layer.experts.down_EDF.detach().clone()
    layer.after_step(1, 10)
    torch.testing.assert_close(layer.experts.down_EDF[1:], before[1:] + 1)
    layer.experts.down_EDF.ds_id = 7  # as ZeRO 3 marks what it has taken apart
    with pytest.raises(RuntimeError, match="assign_=gemoe_ds.engine.zero.assign_"):
        layer.after_step(2, 10)
    with pytest.raises(ValueError, match="step=0: from 1 to"):
        layer.after_step(0, 10)


def test_a_layer_that_has_counted_for_nothing_warns_once():
    layer, x = build("threshold"), tokens(2, 5)
    (layer(x).sum() + layer.aux_loss()).backward()
    with pytest.warns(UserWarning, match="router 'threshold' is evaluated after training in which"):
        layer.eval()(x)
    with warnings.catch_warnings(action="error"):
        layer(x)
