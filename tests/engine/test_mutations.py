"""Faults that do not crash, planted one by one: each must be seen by the test that is named here.

What a planted fault turns red is what keeps it out: without the fault the same calls pass in the
named test.
"""

from __future__ import annotations

import pytest

from gemoe_ds.moe.context import LossTerm, TokenContext
from tests.engine.parity import Case, is_equal, references, run_cases
from tests.helpers import run_ranks
from tests.train.resuming import CUT, Setup, cut_run, setup_config, train_all, write_setting

TRAINABLE = Case(0, ep_size=2, train="all")
RECOMPUTED = Case(2, ep_size=2, recompute=True)


def an_expert_is_missing_in_the_optimizer() -> None:
    from gemoe_ds.engine import build

    whole = build.parameter_groups

    def without_one(model, optim):
        groups = whole(model, optim)
        groups[-1]["params"].pop()
        return groups

    build.parameter_groups = without_one


def expert_gradients_are_doubled() -> None:
    from gemoe_ds.engine import build

    whole = build.mark_trainable_experts

    def doubled(model):
        whole(model)
        for parameter in model.sharded_parameters().values():
            parameter.register_hook(lambda grad: 2 * grad)

    build.mark_trainable_experts = doubled


def each_rank_clips_by_its_own_norm() -> None:
    from gemoe_ds.engine.optimizer import GlobalNormAdamW

    def without_group(self, value):
        self.__dict__["_ignored"] = value

    GlobalNormAdamW.expert_group = property(lambda self: None, without_group)


def losses_pile_up_under_recomputation() -> None:
    from gemoe_ds.moe.router import Router

    once = Router.record

    def again(self, decision, logits_TE, ctx):
        before = self.record_of(ctx).losses
        once(self, decision, logits_TE, ctx)
        record = self.record_of(ctx)
        record.losses = {
            name: LossTerm(term.value + before[name].value.detach(), term.weight)
            if name in before
            else term
            for name, term in record.losses.items()
        }

    def keep(self, *arguments):
        records = list(self.layers)
        begin(self, *arguments)
        self.layers[:] = records

    begin = TokenContext.begin
    Router.record, TokenContext.begin = again, keep


def a_weight_is_not_the_stored_one() -> None:
    from gemoe_ds.checkpoint import state

    whole = state.read_together

    def one_is_changed(*args):
        state.read_together = whole
        *others, last = whole(*args)
        return [*others, last + 1]

    state.read_together = one_is_changed


def with_fault(rank: int, plant, function, *args):
    plant()
    return function(rank, *args)


def test_a_missing_expert_stops_at_start_up(base):
    """Sees it: engine/build.py check_optimizer_holds, held by test_zero.py."""
    expected = references(base, [TRAINABLE], 2)
    plant = an_expert_is_missing_in_the_optimizer
    with pytest.raises(AssertionError, match="does not hold 1 trainable parameters: .*experts"):
        run_ranks(with_fault, 2, plant, run_cases, base, [TRAINABLE], expected)


@pytest.mark.parametrize(
    ("plant", "case", "kinds"),
    [
        (expert_gradients_are_doubled, TRAINABLE, {"gradient"}),
        (each_rank_clips_by_its_own_norm, TRAINABLE, {"norm"}),
        (losses_pile_up_under_recomputation, RECOMPUTED, {"loss"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_parity_sees_it(base, plant, case, kinds):
    """Sees it: test_parity.py test_two_ranks_equal_the_reference, in these kinds of error."""
    expected = references(base, [case], 2)
    by_rank = [
        found
        for results in run_ranks(with_fault, 2, plant, run_cases, base, [case], expected)
        for found in results
    ]
    assert not any(is_equal(case, found) for found in by_rank)
    assert all(found[kind] > 100 * case.bound for found in by_rank for kind in kinds), by_rank


def test_a_weight_that_is_not_the_stored_one_stops_the_resume(tmp_path):
    """Sees it: checkpoint/state.py load_optimizer_state, held by tests/train/test_resume.py."""
    setting, setup = write_setting(tmp_path), Setup(1, 1, 2)
    whole = setup_config(setting, tmp_path / f"whole-routers-{setup}", setup, "routers")
    run_ranks(train_all, 1, [whole])
    _, config = cut_run(setting, setup, setup, "routers")
    (refused,) = run_ranks(with_fault, 1, a_weight_is_not_the_stored_one, train_all, [config])
    assert refused and f"step-{CUT:06d}: the engine holds another" in refused
