"""The rate of every step, by hand."""

import pytest

from gemoe_ds.config.schema import OptimConfig
from gemoe_ds.engine.build import schedule


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1]),
        (
            "cosine",
            [
                1 / 3,
                2 / 3,
                1,
                0.1 + 0.9 * (2 + 2**0.5) / 4,
                0.55,
                0.1 + 0.9 * (2 - 2**0.5) / 4,
                0.1,
            ],
        ),
    ],
)
@pytest.mark.parametrize("updates", [1, 2])
def test_two_steps_of_warm_up(kind, expected, updates):
    """Of six; the last factor is that of a step after the end."""
    optim = OptimConfig(lr=1.0, schedule=kind, warmup_steps=2, min_lr_ratio=0.1)
    factor = schedule(optim, 6, updates)
    assert [factor(update) for update in range(7 * updates)] == pytest.approx(
        [value for value in expected for _ in range(updates)]
    )
