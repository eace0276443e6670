"""Hooks of a user's own: found, called on every rank at the same steps, and remembered."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemoe_ds.checkpoint import manifest
from gemoe_ds.errors import ConfigError
from gemoe_ds.train.hooks import Hook, StepResult, by_name, load_hooks
from tests.helpers import repository, run_ranks
from tests.train.resuming import make_config, one_group, write_setting

SCORES = [1.0, 3.0, 2.0, 2.5, float("nan"), 2.9, 2.0, 9.0]  # of the steps from 1 on


class Scripted(Hook):
    """Adds a metric that is known beforehand, and writes down how it is called."""

    metrics = {"test/score": "max"}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.steps = 0  # in all, over the continuations

    def before_run(self, trainer) -> None:
        self.calls.append(("before", trainer.step, self.steps))

    def before_step(self, trainer, step, batches) -> None:
        self.calls.append(("step", step, trainer.step, len(batches)))

    def after_step(self, trainer, result: StepResult) -> None:
        self.steps += 1
        result.metrics["test/score"] = SCORES[result.step - 1]
        self.calls.append(("after", result.step, trainer.step, result.tokens > 0))

    def after_run(self, trainer) -> None:
        self.calls.append(("end", trainer.step))

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]


def train_with_hooks(rank: int, configs: list) -> list[list[tuple]]:
    """What the hook of each run saw; the checkpoints beside the newest one are left out."""
    import gemoe_ds.train.run as module

    seen = []
    with one_group(module):
        for config in configs:
            hook = Scripted()
            module.train(config, hooks=[hook])
            folders = sorted(p.name for p in (Path(config.output_dir) / "checkpoints").iterdir())
            seen.append([*hook.calls, folders])
    return seen


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("hooks"))


def test_the_best_checkpoint_stays_and_the_run_ends_early_on_all_ranks(setting):
    output = setting["root"] / "run"
    configs = [
        make_config(
            setting,
            output,
            train={"steps": 8, "micro_batch_size": 2, "early_stop": patience},
            checkpoint={"every": 0, "keep": 1, "keep_best": "test/score"},
            monitor={"every": 100, "tensorboard": False},
            resume="auto",
        )
        for patience in (3, 3, 5)
    ]
    first, second = run_ranks(train_with_hooks, 2, configs)
    assert first == second, "the same on every rank"
    until_5, again, until_7 = first
    steps = [(("step", s, s - 1, 1), ("after", s, s, True)) for s in range(1, 8)]
    assert until_5[:-1] == [("before", 0, 0), *(c for s in steps[:5] for c in s), ("end", 5)]
    assert until_5[-1] == ["best", "latest", "step-000002", "step-000005"]
    assert again[:-1] == [("before", 5, 5), ("end", 5)], "it had ended"
    assert until_7[:-1] == [("before", 5, 5), *(c for s in steps[5:] for c in s), ("end", 7)]
    assert until_7[-1] == ["best", "latest", "step-000002", "step-000007"]
    best = manifest.read(output / "checkpoints/best")
    assert best.step == 2 and manifest.newest(output).name == "step-000007"
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    scores = {line["step"]: line["test/score"] for line in lines}
    assert str(scores) == str(dict(enumerate(SCORES[:7], 1))), "also without other metrics"


def test_a_class_is_found_by_its_import_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "hooks_of_mine.py").write_text(
        "from gemoe_ds.train.hooks import Hook\nclass Mine(Hook):\n    class Inner(Hook): pass\n"
        "class Needs(Hook):\n    def __init__(self, size): pass\nvalue = 3\n"
    )
    (tmp_path / "hooks_broken.py").write_text("1 / 0\n")
    (tmp_path / "hooks_lacking.py").write_text("import no_such_library\n")
    mine, inner, ours = load_hooks(
        ["hooks_of_mine:Mine", "hooks_of_mine:Mine.Inner", f"{__name__}:Scripted"]
    )
    assert type(mine).__name__ == "Mine" and type(inner).__name__ == "Inner"
    assert isinstance(ours, Hook)
    wrong = {
        "hooks_of_mine": "write it as my_package.my_module:MyHook",
        "hooks_of_mine.Mine": "write it as",
        "hooks_of_mine:": "write it as",
        "../hooks_of_mine.py:Mine": "write it as",
        "hooks_of_yours:Mine": r"no module hooks_of_yours, .* working directory",
        "hooks_of_mine.sub:Mine": "hooks_of_mine.sub",
        "hooks_of_mine:Main": r"no Main \(did you mean Mine\?\)",
        "hooks_of_mine:value": "no class that extends",
        "pathlib:Path": "no class that extends",
        "hooks_of_mine:Needs": "without arguments: TypeError",
        "hooks_broken:Mine": "cannot be imported: ZeroDivisionError",
        "hooks_lacking:Mine": "cannot be imported: No module named 'no_such_library'",
    }
    for path, words in wrong.items():
        with pytest.raises(ConfigError, match=words):
            load_hooks([path])
    with pytest.raises(ConfigError, match="twice"):
        load_hooks(["hooks_of_mine:Mine"] * 2)


def test_states_have_the_names_of_their_hooks():
    named = by_name([Scripted(), Scripted(), Hook()])
    mine = f"{__name__}:Scripted"
    assert list(named) == [mine, f"{mine}#2", "gemoe_ds.train.hooks:Hook"]


def test_the_hook_of_the_docs_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    page = (repository() / "docs/training.md").read_text(encoding="utf-8")
    (tmp_path / "my_hooks.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    (hook,) = load_hooks(["my_hooks:WarnOfLowK"])
    reasons: list[str] = []
    for step, mean_k in enumerate([1.2, 3.0, *[1.2] * 99], 1):
        assert not reasons
        result = StepResult(step, 0, 0.0, {"mean_k": mean_k})
        hook.after_step(SimpleNamespace(end=reasons.append), result)
        assert ("warned" in result.metrics) == (mean_k < 1.5)
    assert reasons == ["k has collapsed"] and hook.state_dict() == {"warned": 100}
