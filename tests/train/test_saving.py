"""The best checkpoint stays, also through a continuation that does not ask for it."""

from __future__ import annotations

import os

import pytest

from gemoe_ds import train
from gemoe_ds.train.hooks import Hook
from tests.train.resuming import make_config, write_setting


class Scores(Hook):
    """A score for each step."""

    metrics = {"score": "max", "other": "max"}  # noqa: RUF012

    def __init__(self, *scores: float) -> None:
        self.scores = scores

    def after_step(self, trainer, result) -> None:
        result.metrics["score"] = result.metrics["other"] = self.scores[result.step - 1]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("best"))


@pytest.mark.parametrize(
    "metric, scores, best",
    [
        ("score", (5, 1, 9, 9, 3, 4), "step-000001"),  # the third and fourth were not asked for
        ("score", (5, 1, 2, 2, 3, 6), "step-000006"),
        ("other", (5, 1, 2, 2, 4, 3), "step-000005"),  # of another metric: it begins anew
    ],
)
def test_it_outlives_a_continuation_without_keep_best(setting, tmp_path, metric, scores, best):
    for steps, keep_best in ((2, "score"), (4, None), (6, metric)):
        config = make_config(
            setting,
            tmp_path,
            train__steps=steps,
            parallel__ep_size=1,
            checkpoint={"every": 0, "keep": 1, "keep_best": keep_best},
            resume="auto",
        )
        train(config, hooks=[Scores(*scores)])
    root = tmp_path / "checkpoints"
    assert os.readlink(root / "best") == best
    assert sorted(path.name for path in root.glob("step-*")) == sorted({best, "step-000006"})
