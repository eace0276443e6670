"""docs/api.md runs as it stands there; importing the package alone loads nothing heavy."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml

import gemoe_ds
import gemoe_ds.routers
from gemoe_ds.config.load import as_config
from gemoe_ds.engine.world import distributed
from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import Router
from tests.helpers import repository
from tests.train.resuming import make_config, write_data, write_setting

API = (repository() / "docs/api.md").read_text(encoding="utf-8")


def blocks(title: str) -> list[str]:
    """The Python of docs/api.md under a heading."""
    found, heading = [], ""
    for text, code in re.findall(
        r"(.*?)(?:^```python\n(.*?)^```|\Z)", API, re.DOTALL | re.MULTILINE
    ):
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        heading = headings[-1] if headings else heading
        found += [code] * (heading == title and bool(code))
    assert found, title
    return found


@pytest.fixture(scope="module")
def names():
    """What the blocks have defined, one after the other."""
    return {}


def run(title, names):
    for source in blocks(title):
        exec(compile(source, f"docs/api.md: {title}", "exec"), names)


def test_a_layer_in_your_own_model(names):
    run("From Python", names)
    run("A layer in your own model", names)
    assert names["moe"].router.eap.weight.grad.any() and names["y"].shape == names["x"].shape
    listed = re.search(r"any of `Router.names\(\)`: (.*?), or your", " ".join(API.split()))
    assert sorted(listed.group(1).split(", ")) == names["Router"].names()


def test_the_methods_that_change_between_steps_are_named():
    page, kinds = " ".join(API.split()), {name: Router.named(name) for name in Router.names()}
    works = {name for name, kind in kinds.items() if kind.after_step is not Router.after_step}
    writes = {name for name, kind in kinds.items() if "assign_(" in inspect.getsource(kind)}
    for wanted, place in (
        (works, r"Some methods change between steps: (.*?) Call `moe.after_step"),
        (writes, r"writes its parameters in `after_step` \((.*?)\)"),
    ):
        named = re.findall(r"`(\w+)`", re.search(place, page).group(1))
        assert {*named} & kinds.keys() == wanted


def test_a_transformers_model_under_pytorch_trainer_and_deepspeed(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("A transformers model that is in memory", names)
    assert all(".router." in name for name in names["handle"].trainable_parameters())
    before = {n: p.clone() for n, p in names["handle"].trainable_parameters().items()}
    pytest.importorskip("accelerate")
    run("With Trainer", names)
    assert (tmp_path / "trainer/checkpoint-2/model.safetensors").exists()
    handle = names["handle"]
    trained = [trainer_of(names, tmp_path, accumulation) for accumulation in (1, 2)]
    assert_eval_loss_is_the_cross_entropy(names, trained)
    assert_threshold_gives_its_mean_k(names, tmp_path)
    names["handle"] = handle
    with distributed():
        run("With DeepSpeed", names)
    for name, p in names["handle"].trainable_parameters().items():
        assert not (p == before[name]).all(), name


def trainer_of(names, folder, accumulation: int, router="gemoe", **options):
    """The documented subclass with a model of its own."""
    from transformers import OlmoeConfig, OlmoeForCausalLM, TrainingArguments

    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**names["sizes"], num_experts=8, num_experts_per_tok=4))
    handle = names["convert"](model, router=router, **options)
    arguments = TrainingArguments(
        folder / "other",
        max_steps=20,
        learning_rate=0.0,
        gradient_accumulation_steps=accumulation,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = names["rows"]
    callbacks = [handle.trainer_callback()]
    return handle, names["MoETrainer"](
        model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks
    )


def assert_eval_loss_is_the_cross_entropy(names, trained) -> None:
    """Before a training and after it, whatever the accumulation."""
    for handle, trainer in trained:
        names["handle"] = handle
        with torch.no_grad():
            expected = float(handle.model.eval()(**names["batch"]).loss)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected)


def assert_threshold_gives_its_mean_k(names, folder) -> None:
    handle, trainer = trainer_of(names, folder, 1, "threshold", mean_k=2.0, train_mean_k=(1, 4))
    names["handle"] = handle
    trainer.train()
    trainer.evaluate()
    assert torch.stack(handle.k_per_layer).float().mean() == pytest.approx(2, abs=0.2)


def test_a_whole_run(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config(write_setting(tmp_path), tmp_path / "run", parallel__ep_size=1)
    (tmp_path / "recipe.yaml").write_text(config.dump_yaml())
    write_data(tmp_path / "data/test", 6)
    environment = dict(os.environ)
    with pytest.raises(ConfigError, match="k=9 exceeds"):
        gemoe_ds.evaluate("recipe.yaml", data="data/test", out="results", k=9)
    run("A whole run", names)
    assert sorted(names["records"]) == ["mean_k_2", "mean_k_3"]
    for folder, record in names["records"].items():
        assert abs(record.mean_k - int(folder[-1])) < 0.1 and 0 <= record.accuracy <= 1
        assert (tmp_path / "results" / folder / "eval.json").exists()
    assert names["run"] == tmp_path / "run"
    assert environment == dict(os.environ) and not torch.distributed.is_initialized()
    with distributed(), pytest.raises(ConfigError, match="destroy_process_group"):
        gemoe_ds.train("recipe.yaml", "output_dir=other")
    with pytest.raises(ConfigError, match="give --trained RUN"):
        gemoe_ds.evaluate("recipe.yaml", data="data/test", out="results")


def test_a_configuration_is_a_path_a_dict_or_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config(write_setting(tmp_path), tmp_path / "run", parallel__ep_size=1)
    (tmp_path / "recipe.yaml").write_text(config.dump_yaml())
    tree = yaml.safe_load(config.dump_yaml())
    for given in ("recipe.yaml", tmp_path / "recipe.yaml", tree, config):
        assert as_config(given, ["train.steps=9"]).train.steps == 9
        assert as_config(given) == config
    with pytest.raises(ConfigError, match="or name of a recipe; got NoneType"):
        gemoe_ds.train(None)
    with pytest.raises(ConfigError, match="train.stepz: no such option.*did you mean steps"):
        gemoe_ds.train(tree, "train.stepz=1")


def test_import_alone_is_light():
    code = (
        "import sys, gemoe_ds; heavy = {'torch', 'deepspeed', 'transformers', 'pydantic'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); "
        "assert set(gemoe_ds.__all__) <= set(dir(gemoe_ds)); "
        "assert not hasattr(gemoe_ds, 'convertt')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository())


def test_train_is_a_package_and_a_function():
    import gemoe_ds.train.run
    from gemoe_ds import train

    assert train is gemoe_ds.train and callable(train) and train.run.train


def test_the_readme_s_lines_run():
    (source,) = re.findall(
        r"^```python\n(.*?)^```",
        (repository() / "README.md").read_text("utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    names: dict = {}
    exec(compile(source, "README.md", "exec"), names)
    assert names["moe"].router.eap.weight.grad.any()
