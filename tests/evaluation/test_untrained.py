"""--router: routers without training, on gates of the base and on those that a run has tuned."""

from __future__ import annotations

import pytest
import torch

import gemoe_ds
from gemoe_ds.checkpoint.state import load_trained
from gemoe_ds.engine.world import distributed
from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.arguments import RoutingMode, check_evaluation, evaluate_parser
from gemoe_ds.evaluation.session import EvalSession, session_config
from gemoe_ds.evaluation.untrained import choose
from tests.train.resuming import make_config, write_setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="module")
def config(setting):
    """A recipe whose own router is GeMoE."""
    return make_config(setting, setting["root"] / "run", parallel__ep_size=1)


@pytest.fixture(scope="module")
def run(config):
    gemoe_ds.train(config, "train.steps=2", "optim.lr=0.1")
    return config.output_dir


def test_budgets_on_the_untouched_gates(setting, config, tmp_path, capsys):
    """Folders and methods have the routers' names; what is printed gives the same once more."""
    given = {"data": setting["data"], "router": ["score", {"name": "ratio", "k_low": 2}]}
    found = gemoe_ds.evaluate(config, out=tmp_path / "a", mean_k=[2.5, 3], k=4, **given)
    names = [f"{name}_mean_k_{k}" for name in ("score", "ratio") for k in ("2.5", "3")]
    assert list(found) == ["k_4", *names]
    for name, record in list(found.items())[1:]:
        assert record.method == name.split("_")[0] and record.k is None
        assert record.mean_k == pytest.approx(record.budget_k, rel=0.02)
    line = next(line for line in capsys.readouterr().out.splitlines() if "threshold: " in line)
    again = line.split("--router '")[1].removesuffix("'")
    same = gemoe_ds.evaluate(config, out=tmp_path / "b", data=setting["data"], router=again)
    first = found["score_mean_k_2.5"]
    assert same["."].mean_k_per_layer == first.mean_k_per_layer and same["."].budget_k is None
    neutral = gemoe_ds.evaluate(config, out=tmp_path / "c", data=setting["data"], router="score")
    assert neutral["."].accuracy_by_kind == found["k_4"].accuracy_by_kind
    assert neutral["."].mean_k == 4


def test_every_layer_meets_the_budget(setting, config, tmp_path, capsys):
    given = {"data": setting["data"], "out": tmp_path, "mean_k": 3, "router": "score"}
    (record,) = gemoe_ds.evaluate(config, per_layer=True, **given).values()
    assert record.mean_k_per_layer == pytest.approx([3, 3], rel=0.02)
    assert "--router '{name: score, threshold: [0." in capsys.readouterr().out


def test_alloc_moe_shares_the_budget_out(setting, config, tmp_path, capsys):
    given = {"data": setting["data"], "mean_k": [2, 3], "router": "alloc_moe"}
    found = gemoe_ds.evaluate(config, out=tmp_path / "a", **given)
    for record in found.values():
        assert record.mean_k == pytest.approx(record.budget_k, rel=0.02)
    lines = [
        line for line in capsys.readouterr().out.splitlines() if "{name: alloc_moe, k: " in line
    ]
    assert len(lines) == 2 and "after 8 passes" in lines[0]  # 1 + 2 layers * 3, and that of the k


def test_gates_that_a_run_has_tuned(setting, config, run, tmp_path):
    """The rule stands on the tuned gates, static k on those of the base."""
    (record,) = gemoe_ds.evaluate(
        config, out=tmp_path, data=setting["data"], trained=run, router="score", mean_k=3
    ).values()
    assert record.method == "score_tuned" and record.mean_k == pytest.approx(3, rel=0.02)
    argv = ["-", "--data", "d", "--out", "o", "--router", "score", "--k", "4", "--trained", run]
    arguments = evaluate_parser(None).parse_intermixed_args(argv)
    arguments.recipe, arguments.trained = config, tmp_path / run
    with distributed() as world:
        session = EvalSession(arguments, session_config(arguments), world)
        step = session.checkpoint
        tuned = [t for name, t in load_trained(step).items() if name.endswith("gate.weight")]
        session.set_routing(RoutingMode(router="score"))
        for layer, static, gate_ED in zip(
            session.model.moe_layers, session.static, tuned, strict=True
        ):
            assert layer.router.name == "score"
            assert torch.equal(layer.router.gate.weight, gate_ED)
            assert not torch.equal(static.gate.weight, gate_ED)


@pytest.mark.parametrize(
    "given, words",
    [
        (["gemoe"], "gemoe: has to be trained before it routes; .* one of alloc_moe, entropy"),
        (["evolve"], "evolve: has to be trained"),
        (["scor"], r"router 'scor' is not known; .*did you mean score\?"),
        (["score", "{name: score, k_low: 2}"], "score: stands twice"),
        (["{name: score, low: 2}"], "low: no such option; router score has k_low"),
        (["{name: score, threshold: 2}"], "threshold=2: .*2: must be 0 or more, 1 or less"),
        (["{k_low: 2}"], "give a name, or a mapping with a name"),
        (["{name: score"], "--router {name: score: not YAML"),
        ([{"name": 3}], "give a name, or a mapping"),
    ],
)
def test_what_cannot_route_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        choose(given)


@pytest.mark.parametrize(
    "given, words",
    [
        (["--router", "score", "--flips"], "--flips compares"),
        (["--router", "score", "--per-layer"], "--per-layer says how --mean-k is met"),
        (["--mean-k", "3", "--k", "8"], "--mean-k goes with --trained RUN or --router NAME"),
        ([], "give --trained RUN .* or --router NAME"),
    ],
)
def test_contradictions(given, words):
    argv = ["-", "--data", "d", "--out", "o", *given]
    with pytest.raises(ConfigError, match=words):
        check_evaluation(evaluate_parser(None).parse_intermixed_args(argv))
