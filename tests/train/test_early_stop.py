"""What is the best value of a metric, and when a run has waited long enough for a better one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gemoe_ds.errors import ConfigError
from gemoe_ds.train.early_stop import Best, EarlyStop, best_of
from gemoe_ds.train.hooks import Hook, StepResult

NAN = float("nan")


def results(values):
    """A step each; None: not evaluated."""
    for step, value in enumerate(values, 1):
        yield StepResult(step, 0, 0.0, {} if value is None else {"m": value})


@pytest.mark.parametrize(
    "mode, values, expected",
    [
        ("min", [3, None, 2, 2, NAN, 1, 4], [True, None, True, False, False, True, False]),
        ("max", [3, None, 2, 3, NAN, 4, 1], [True, None, False, False, False, True, False]),
        ("min", [NAN, float("inf"), 5], [False, True, True]),
    ],
)
def test_a_better_value_is_the_best(mode, values, expected):
    best = Best("m", mode)
    assert [best.update(result) for result in results(values)] == expected
    again = Best("m", mode)
    again.load_state_dict(best.state_dict())
    assert (again.value, again.step) == (best.value, best.step)
    other = Best("other", mode)
    other.load_state_dict(best.state_dict())
    assert other.value is None, "another metric begins anew"


def ended_after(values, patience, state=None) -> tuple[int | None, EarlyStop]:
    hook, reasons = EarlyStop(Best("m", "max"), patience), []
    trainer = SimpleNamespace(end=reasons.append)
    if state:
        hook.load_state_dict(state)
    hook.before_run(trainer)
    if reasons:
        return 0, hook
    for result in results(values):
        hook.after_step(trainer, result)
        if reasons:
            assert "m has not improved in" in reasons[0]
            return result.step, hook
    return None, hook


def test_it_waits_for_so_many_evaluations_in_a_row():
    assert ended_after([1, 3, 2, None, 2.5, 3, 4], 3)[0] == 6
    assert ended_after([1, 3, 2, None, 2.5, 4, 1, 1], 3)[0] is None
    assert ended_after([NAN, NAN], 2)[0] == 2


def test_a_continuation_goes_on_counting():
    _, first = ended_after([1, 3, 2], 3)
    assert ended_after([2, 2, 2], 3, first.state_dict())[0] == 2
    assert ended_after([4, 2, 2], 3, first.state_dict())[0] is None, "the best is known too"
    _, over = ended_after([3, 2, 2], 2)
    assert ended_after([9], 2, over.state_dict())[0] == 0, "it had ended"
    assert ended_after([2, 2, 2], 4, over.state_dict())[0] == 2, "more patience"


def test_the_metric_must_be_one_of_a_hook_s():
    class Scoring(Hook):
        metrics = {"test/score": "max"}  # noqa: RUF012

    def config(metric, mode=None, early_stop=0):
        checkpoint = SimpleNamespace(keep_best=metric, keep_best_mode=mode)
        return SimpleNamespace(checkpoint=checkpoint, train=SimpleNamespace(early_stop=early_stop))

    assert best_of(config("test/score"), [Scoring()]).mode == "max"
    assert best_of(config("test/score", "min"), [Scoring()]).mode == "min"
    assert best_of(config(None), [Scoring()]) is None
    with pytest.raises(ConfigError, match=r"keep_best=test/scor: .*did you mean test/score\?"):
        best_of(config("test/scor"), [Scoring()])
    with pytest.raises(ConfigError, match="validation/loss.* there are: test/score"):
        best_of(config(None, early_stop=1), [Scoring()])
