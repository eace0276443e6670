"""A step that is cut into other micro-batches is the same step, where the run says that it is."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from gemoe_ds.checkpoint.state import load_trained
from gemoe_ds.config.validate import validate_run
from gemoe_ds.data.sample import open_samples, write_samples
from gemoe_ds.errors import ConfigError
from tests.data.turns import cut_image
from tests.helpers import repository, run_ranks
from tests.train.resuming import losses, make_config, train_all, write_setting

STEPS, GLOBAL, BROKEN = 3, 4, (2, 3, 5, 7, 11, 13)
# Relative, of losses and weights: sums in another order. Rounding near a tie may choose another
# expert, which none of these runs does.
BOUND = 1e-5
ROUTERS = {  # name -> options, train.auxiliary_batch_size
    "gemoe": ({"budget_k": 2.5, "balance_weight": 0.3}, 1),
    "threshold": ({"balance_weight": 0.3}, 1),
    "top_k": ({"balance_weight": 0.0, "entropy_weight": 0.5}, None),
    "beam": ({"balance_weight": 0.0}, None),
}


@dataclass(frozen=True)
class Cut:
    ranks: int
    micro: int
    zero: int = 2


CUTS = (Cut(1, 4), Cut(1, 2, zero=0), Cut(1, 1), Cut(2, 2, zero=0), Cut(2, 1))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Some samples have a picture that cannot be read, so that a group may have no token."""
    setting = write_setting(tmp_path_factory.mktemp("micro-batches"))
    good, data = open_samples(setting["data"]), setting["root"] / "harmed"
    samples = [good[row] for row in range(len(good))]
    for row in BROKEN:
        if samples[row].images:
            samples[row] = cut_image(samples[row], 200)
    write_samples(iter(samples), data, source="test")
    return setting | {"data": data}


def config_of(setting, router: str, cut: Cut, name: str = "", **changes):
    options, together = ROUTERS[router]
    defaults = {
        "model__router": {"name": router, **options},
        "optim__eps": 1e-3,  # Adam would turn rounding into steps of full size
        "parallel__ep_size": 1,
        "train": {
            "steps": STEPS,
            "micro_batch_size": cut.micro,
            "global_batch_size": GLOBAL,
            "auxiliary_batch_size": together,
        },
        "data__max_bad_samples": 0.9,
        "checkpoint": {"every": 0},
        "deepspeed": str(repository() / f"ds_configs/zero{cut.zero}.json"),
    }
    output = setting["root"] / (name or f"{router}-{cut}")
    return make_config(setting, output, **defaults | changes)


def train_them(configs: dict[int, list]) -> None:
    """By the number of their ranks."""
    for ranks, some in configs.items():
        found = run_ranks(train_all, ranks, some, timeout=900)
        assert not any(found), found


@pytest.fixture(scope="module")
def runs(setting):
    """GeMoE and top-k in two cuts; GeMoE also without groups, and as a run that changes its cut."""
    alone, together = Cut(1, 4), Cut(2, 1, zero=0)
    ungrouped = {"train__auxiliary_batch_size": None}
    train_them(
        {
            1: [
                config_of(setting, "gemoe", alone),
                config_of(setting, "top_k", alone),
                config_of(setting, "top_k", Cut(1, 1, zero=0)),
                config_of(setting, "gemoe", alone, "ungrouped-1", **ungrouped, train__steps=2),
                config_of(setting, "gemoe", alone, "cut", train__steps=2),
            ],
            2: [
                config_of(setting, "gemoe", together),
                config_of(setting, "gemoe", together, "ungrouped-2", **ungrouped, train__steps=2),
                config_of(setting, "gemoe", together, "cut", resume="auto"),
            ],
        }
    )
    return setting["root"]


def check_same(one, other) -> None:
    expected = losses(one)
    assert expected.keys() == set(range(1, STEPS + 1))
    assert losses(other) == pytest.approx(expected, rel=BOUND)
    weights = [load_trained(run / f"checkpoints/step-{STEPS:06d}") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() <= BOUND * tensor.abs().max(), name


@pytest.mark.parametrize("router, cut", [("gemoe", Cut(2, 1, 0)), ("top_k", Cut(1, 1, 0))])
def test_another_cut_of_a_step_gives_the_same_losses_and_weights(runs, router, cut):
    check_same(runs / f"{router}-{CUTS[0]}", runs / f"{router}-{cut}")


def test_without_groups_it_does_not(runs):
    first, second = (losses(runs / f"ungrouped-{ranks}") for ranks in (1, 2))
    assert abs(first[1] / second[1] - 1) > 100 * BOUND


def test_a_run_goes_on_with_another_micro_batch_and_other_ranks(runs):
    check_same(runs / f"gemoe-{CUTS[0]}", runs / "cut")


@pytest.mark.slow
def test_all_cuts_of_a_step_give_the_same_losses_and_weights(setting):
    train_them(
        {
            ranks: [
                config_of(setting, router, cut, f"all-{router}-{cut}")
                for router in ROUTERS
                for cut in CUTS
                if cut.ranks == ranks
            ]
            for ranks in (1, 2)
        }
    )
    for router in ROUTERS:
        for cut in CUTS[1:]:
            first = setting["root"] / f"all-{router}-{CUTS[0]}"
            check_same(first, setting["root"] / f"all-{router}-{cut}")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train__auxiliary_batch_size": 3}, "auxiliary_batch_size=3 does not divide train.mic"),
        (
            {"model__router": {"name": "alloc_moe"}, "train__auxiliary_batch_size": 2},
            "of router 'alloc_moe' not only losses are of a micro-batch, but a budget of experts",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_once(setting, changes, words):
    with pytest.raises(ConfigError, match=words):
        validate_run(config_of(setting, "gemoe", Cut(1, 4), "refused", **changes), 1)
