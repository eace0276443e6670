"""The untouched backbone beside a run: figures of `gemoe evaluate`, and a warning if it wins."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import gemoe_ds
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.data.sample import open_samples
from gemoe_ds.data.stream import EvalStream
from gemoe_ds.engine.world import ALONE, distributed
from gemoe_ds.evaluation.arguments import RoutingMode, evaluate_parser
from gemoe_ds.evaluation.score import Scores, evaluate
from gemoe_ds.evaluation.session import EvalSession, session_config
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.train.assemble import build_collator, build_model
from gemoe_ds.train.hooks import Hook
from gemoe_ds.train.untouched import Mean, Outcome, Untouched, described, not_compared, warning
from gemoe_ds.train.validation import Validation
from tests.train.resuming import make_config, write_setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A backbone that has learned something of its data, so that a bad router does harm."""
    setting = write_setting(tmp_path_factory.mktemp("twin"))
    config = config_of(setting, "pretrained", steps=100, lr=2e-2, model__trainable="all")
    gemoe_ds.train(config)
    return setting | {"hf": Path(config.output_dir) / "hf"}


def config_of(setting, name: str, router: object = "gemoe", steps: int = 2, lr=1e-2, **changes):
    own = {"model__router": {"name": router} if isinstance(router, str) else router}
    own |= {"train": {"steps": steps, "micro_batch_size": 4}, "optim__lr": lr}
    return make_config(setting, setting["root"] / name, parallel__ep_size=1, **(own | changes))


def trained(setting, name: str, router: object, stop=None, hooks=(), **changes) -> dict:
    """The metrics of a run's evaluation at its end."""
    changes |= {"data__validation_path": str(setting["data"])}
    config = config_of(setting, name, router, **changes)
    gemoe_ds.train(config, "train.eval_every=2", stop=stop, hooks=hooks)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return {n.removeprefix("validation/"): value for n, value in json.loads(lines[-1]).items()}


def evaluated(setting, config, **mode) -> Scores:
    """As `gemoe evaluate` does it, on the backbone."""
    arguments = evaluate_parser(None).parse_args(["-", "--data", "-", "--out", "-", "--batch", "4"])
    arguments.recipe, arguments.data = config, setting["data"]
    arguments.k = [mode["k"]] if "k" in mode else None
    arguments.router = [mode["router"]] if "router" in mode else None
    with distributed() as world:
        session = EvalSession(arguments, session_config(arguments), world)
        session.set_routing(RoutingMode(**mode))
        return session.scored(open_samples(setting["data"]))


def test_figures_are_those_of_evaluate(setting, capsys):
    found = trained(setting, "static 3", {"name": "top_k", "k": 3})
    assert found["mean_k"] == 3
    config = config_of(setting, "evaluated")
    for name, mode in (("static", {"k": 3}), ("score", {"router": "score", "mean_k": 3})):
        scores = evaluated(setting, config, **mode)
        assert found[f"untouched_{name}_loss"] == pytest.approx(scores.loss, rel=1e-5), name
        assert found[f"untouched_{name}_accuracy"] == pytest.approx(scores.accuracy), name
    assert found["untouched_static_loss"] != found["untouched_score_loss"]
    out = capsys.readouterr()
    assert "untouched backbone at mean k 3.000: static k 3 loss " in out.out + out.err


def test_a_run_that_does_worse_than_nothing_is_told(setting, capsys):
    good = trained(setting, "good", {"name": "top_k", "k": 2}, lr=1e-4)
    assert "WARNING" not in "".join(capsys.readouterr())
    bad = trained(setting, "bad", {"name": "top_k", "k": 2}, lr=50.0, optim__warmup_steps=0)
    (line,) = [x for x in "".join(capsys.readouterr()).splitlines() if "WARNING" in x]
    assert line.startswith("step 2: WARNING: training does worse than the untouched backbone")
    assert "of static" in line and "of score" in line
    same = [f"untouched_{name}_{of}" for name in ("static", "score") for of in ("loss", "accuracy")]
    assert {name: good[name] for name in same} == {name: bad[name] for name in same}


def test_only_a_backbone_that_stays_is_compared(setting, capsys):
    found = trained(setting, "experts", "gemoe", model__trainable="experts")
    said = "model.trainable=experts changes the backbone, which is not compared"
    assert "".join(capsys.readouterr()).count(said) == 1
    assert "loss" in found and not [name for name in found if "untouched" in name]
    off = trained(setting, "off", "gemoe", train__compare_untouched=False)
    said = "".join(capsys.readouterr())
    assert "untouched backbone at" not in said and "untouched_static_loss" not in off


def test_a_run_without_evaluations_says_how_to_compare(setting, capsys):
    config = config_of(setting, "silent", data__validation_path=str(setting["data"]))
    gemoe_ds.train(config)
    out = "".join(capsys.readouterr())
    assert out.count("not compared with the untouched backbone: train.eval_every=2 does it") == 1
    assert not_compared(config_of(setting, "blind")) is None  # nothing to evaluate on


class Late(StopRequest):
    """Asks once the untouched backbone has its first figure."""

    validation: Validation | None = None

    @property
    def by(self) -> str | None:
        found = self.validation and self.validation.untouched and self.validation.untouched.found
        return "SIGTERM" if found else None

    @by.setter
    def by(self, value: str | None) -> None:
        pass


def test_a_signal_leaves_the_trained_figures(setting, capsys):
    stop = Late()

    class Knows(Hook):
        def before_run(self, trainer) -> None:
            stop.validation = trainer.hooks["validation"]

    found = trained(setting, "late", "gemoe", stop=stop, hooks=[Knows()])
    assert stop.by and found["loss"] > 0
    assert not [name for name in found if "untouched" in name]
    assert "step 2: not compared with the untouched backbone" in "".join(capsys.readouterr())


def test_every_figure_is_made_once_and_joined_by_lines(setting):
    config = config_of(setting, "in memory")
    model, samples = build_model(config, ExpertShard()), open_samples(setting["data"])
    collator = build_collator(config, model)
    titles: list[str | None] = []

    def score(routers, limit, title):
        stream = EvalStream(samples, collator, batch=8, rank=0, world=1, limit=limit)
        titles.append(title)
        model.ctx.routers = routers
        device = torch.device("cpu")
        try:
            return evaluate(model, samples, stream, device, ALONE, in_detail=False)
        finally:
            model.ctx.routers = None

    untouched = Untouched(model, len(samples), score)
    assert untouched.at(0.0) == untouched.at(0.9) == untouched.at(8.1) == {} and not titles
    (two,), three = untouched.at(1.0).values(), untouched.at(3.0)
    assert list(three) == ["static", "score"] and two.mean_k == 1
    assert list(untouched.at(4.0)) == ["static"] and list(untouched.at(6.5)) == ["static"]
    at = untouched.at(3.25)
    assert {name: outcome.mean_k for name, outcome in at.items()} == pytest.approx(
        {"static": 3.25, "score": 3.25}, rel=0.02
    )
    static_4 = untouched.found["static", 4]
    for of in ("loss", "accuracy"):
        low, high = getattr(three["static"], of).value, getattr(static_4, of).value
        assert getattr(at["static"], of).value == pytest.approx(0.75 * low + 0.25 * high, rel=1e-5)
    made = [title for title in titles if title]
    assert len(set(made)) == len(made)
    before = len(titles)
    untouched.at(3.3)
    assert len(titles) == before
    at.pop("score")
    assert "between k 3 and 4, loss" in described(3.25, at)
    assert described(3.25, at).endswith("router score cannot be held there")


def random_means(seed: int, samples: int, groups: int) -> tuple[Mean, Mean]:
    """Ragged: of a sample there may be nothing, of a group only some."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 4, (samples, groups)) * (rng.random((samples, 1)) < 0.9)
    chance = rng.random((samples, 1))
    a, b = (rng.binomial(weight, chance * scale).astype(np.float32) for scale in (0.9, 0.8))
    return Mean(a, weight), Mean(b, weight)


@pytest.mark.parametrize("groups", [1, 4])
def test_the_standard_error_is_that_of_the_jackknife(groups):
    a, b = random_means(0, 400, groups)
    value, error = a.minus(b)
    assert value == pytest.approx(a.value - b.value)

    def without(n: int) -> float:
        cut = [Mean(np.delete(m.value_NG, n, 0), np.delete(m.weight_NG, n, 0)) for m in (a, b)]
        return cut[0].value - cut[1].value

    left_N = np.array([without(n) for n in range(400) if a.weight_NG[n].any()])
    jackknife = math.sqrt((len(left_N) - 1) * left_N.var())
    assert error == pytest.approx(jackknife, rel=0.02)


def test_chance_is_no_loss_and_a_planted_one_is():
    """20 pairs of equal methods: about one in 20 seems different."""

    def outcomes(seed: int, harm: float) -> tuple[Outcome, dict[str, Outcome]]:
        rng = np.random.default_rng(seed)
        weight = np.ones((300, 1), np.float32)
        base = rng.random((300, 1))
        noise = rng.normal(0, 0.3, (2, 300, 1))
        mine, theirs = (Mean(base + n + h, weight) for n, h in zip(noise, (harm, 0), strict=True))
        none = Mean(np.zeros((300, 0), np.float32), np.zeros((300, 0), np.float32))
        return Outcome(3, mine, none), {"static": Outcome(3, theirs, none)}

    assert sum(warning(*outcomes(seed, 0)) is not None for seed in range(40)) <= 4
    assert all(warning(*outcomes(seed, 0.15)) for seed in range(20))
    assert not any(warning(*outcomes(seed, -0.15)) for seed in range(20))


def test_a_model_that_gives_no_number_is_worse():
    nan, one = (Mean(np.full((4, 1), x), np.ones((4, 1))) for x in (math.nan, 1.0))
    assert "loss nan against 1.0" in str(
        warning(Outcome(3, nan, one), {"score": Outcome(3, one, one)})
    )
    assert warning(Outcome(3, one, one), {"score": Outcome(3, nan, one)}) is None
    alone = Mean(one.value_NG[:1], one.weight_NG[:1])
    assert alone.minus(alone) == (0, math.inf)
