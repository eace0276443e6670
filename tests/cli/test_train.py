"""`gemoe train` as launchers start it: what is wrong costs one line, a non-zero exit, no files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from gemoe_ds.cli.train import main
from tests.cluster.launches import TRAIN, ranks
from tests.helpers import free_port, repository, run_python, run_ranks
from tests.train.resuming import make_config, train_all, write_setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("launch"))


@pytest.fixture
def recipe(setting, tmp_path):
    config = make_config(setting, tmp_path / "run", parallel__ep_size=1, checkpoint__every=2)
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump_yaml())
    return path


def refused(capfd, *arguments) -> str:
    """The single error line of a run in this process."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert "Traceback" not in "\n".join(lines)
    return lines[-1]


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.router.treshold=1", "model.router.treshold: no such option; gemoe has"),
        ("optim.learning_rate=1", "optim.learning_rate: no such option; optim has lr"),
        ("data.train_path=/nowhere", "data.train_path=/nowhere: no such file or folder"),
        ("model.checkpoint=/nowhere", "model.checkpoint=/nowhere: no such"),
        ("parallel.ep_size=2", "parallel.ep_size=2 does not divide the 1 ranks"),
        ("model.router.name=gemo", "known: ada_k, adamoe, alloc_moe, beam"),
        ("resume=/nowhere", "resume=/nowhere: no such"),
    ],
)
def test_wrong_options_are_one_line(recipe, capfd, override, words):
    assert words in refused(capfd, recipe, override)
    assert not (recipe.parent / "run").exists()


def test_print_config_prints_a_recipe_and_stops(recipe, capsys):
    main([str(recipe), "--print-config", "seed=7"])
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 7
    assert not (recipe.parent / "run").exists()


def start(launcher: list[str], *arguments, env: dict | None = None) -> subprocess.CompletedProcess:
    """The module where a launcher has its word for one, else the file."""
    is_module = launcher[-1] in ("-m", "--module")
    program = "gemoe_ds.cli.train" if is_module else "launch/train.py"
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | (env or {})
    programs = f"{os.path.dirname(sys.executable)}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        [*launcher, program, *map(str, arguments)],
        cwd=repository(),
        env=environment | {"PATH": programs},
        capture_output=True,
        text=True,
        timeout=200,
    )


def deepspeed() -> list[str]:
    return ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module"]


def torchrun() -> list[str]:
    return ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m"]


def test_alone_deepspeed_and_torchrun_start_the_same_run(recipe, tmp_path):
    """One rank with twice the accumulation, and two ranks (EP 2) under both launchers."""
    losses = {}
    for name, launcher, changes in (
        ("alone", [], ["train.gradient_accumulation_steps=4"]),
        ("deepspeed", deepspeed()[:-1], ["parallel.ep_size=2"]),
        ("torchrun", torchrun(), ["parallel.ep_size=2"]),
    ):
        out = tmp_path / name
        changes = [f"output_dir={out}", "train.steps=2", *changes]
        done = (
            start(launcher, recipe, *changes) if launcher else run_python(TRAIN, recipe, *changes)
        )
        assert done.returncode == 0, done.stderr[-2000:]
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        losses[name] = [line["loss/lm"] for line in lines]
        assert (out / "config.yaml").exists()
    assert losses["deepspeed"] == losses["torchrun"]
    assert losses["deepspeed"] == pytest.approx(losses["alone"], rel=1e-5)


def two_ranks(folder, recipe, *changes) -> tuple[int, str]:
    """The exit code, and what was said: like a launcher, once the first has failed or both end."""
    with ranks(folder, recipe, 2, *changes) as started:
        code = started.processes[0].wait(120) or max(started.codes())
        return code, started.log(0) + started.log(1)


@pytest.fixture(scope="module")
def run_of_two(setting):
    """The recipe of the tests above after two steps on two ranks."""
    train = {"steps": 2, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
    output = setting["root"] / "run of two"
    config = make_config(setting, output, train=train, checkpoint__every=2)
    assert run_ranks(train_all, 2, [config]) == [None, None]
    return output


@pytest.mark.parametrize("harm", ["experts", "foreign", "damaged"])
def test_two_ranks_refuse_together_without_a_hang(
    setting, recipe, run_of_two, tmp_path, tmp_path_factory, harm
):
    logs = tmp_path_factory.mktemp("logs")
    changes = ["parallel.ep_size=2", "train.steps=2"]
    if harm == "experts":
        changes = ["parallel.ep_size=2", f"model.checkpoint={odd_experts(setting, tmp_path, 5)}"]
        words = "ep_size=2 does not divide the backbone's 5 experts"
    else:
        shutil.copytree(run_of_two, recipe.parent / "run")
        step = recipe.parent / "run/checkpoints/step-000002"
        if harm == "foreign":
            changes += [f"resume={step}", "model.router.k_low=2", "train.steps=4"]
            words = "belongs to another run"
        else:
            (step / "weights-00000.safetensors").write_bytes(b"x")
            changes += [f"resume={step}", "train.steps=4"]
            words = "weights-00000.safetensors is damaged"
    before = sorted(tmp_path.rglob("*"))
    began = time.monotonic()
    if harm == "damaged":
        done = start(deepspeed(), recipe, *changes)
        code, said = done.returncode, done.stderr
    else:
        code, said = two_ranks(logs, recipe, *changes)
    assert code != 0 and time.monotonic() - began < 90
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0], said[-2000:]
    assert "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before, "nothing half-written"


def odd_experts(setting, folder, num_experts):
    import torch

    from gemoe_ds.models.tiny.backbone import TinyBackbone
    from tests.tiny import SHAPE

    torch.manual_seed(0)
    config = TinyBackbone.Config(**SHAPE | {"num_experts": num_experts, "top_k": 2})
    TinyBackbone(config).load(None, setting["tokenizer"]).save_pretrained(folder / "odd")
    return folder / "odd"


def test_a_finished_run_is_left_alone_and_an_occupied_folder_refused(recipe):
    one = ["train.steps=1", "optim.warmup_steps=0"]
    first = run_python(TRAIN, recipe, *one)
    assert first.returncode == 0, first.stderr[-2000:]
    again = run_python(TRAIN, recipe, *one, "--resume", "auto")
    assert again.returncode == 0 and "already finished" in again.stdout
    fresh = run_python(TRAIN, recipe, *one)
    assert fresh.returncode == 2 and "already holds a run" in fresh.stderr
    shutil.rmtree(recipe.parent / "run")
