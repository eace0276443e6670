"""gemoe benchmark answer: a run by its folder, tasks of both harnesses, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from unittest import mock

import pytest

from gemoe_ds.analysis.benchmarks.files import read_mode
from gemoe_ds.cli.benchmark.answer import main
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.evaluation.benchmarks import answer_modes
from tests.evaluation.benchmarks.conftest import miniature  # noqa: F401  (a fixture)
from tests.evaluation.benchmarks.hand_made import write_recipe
from tests.helpers import run_ranks
from tests.train.resuming import make_config, train_all, write_setting


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    setting = write_setting(tmp_path_factory.mktemp("answer"))
    write_recipe(setting)
    config = make_config(setting, setting["root"] / "run", parallel__ep_size=1)
    assert run_ranks(train_all, 1, [config]) == [None]
    return setting["root"] / "run"


def refused(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    assert left.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_says_what_scoring_will_need(
    run,
    miniature,  # noqa: F811
    capsys,
    monkeypatch,
    rank,
):
    """Under mpirun, whose ranks have no RANK of their own."""
    monkeypatch.setattr(answer_modes, "answer_all", lambda *_: None)
    own = {f"OMPI_COMM_WORLD_{name}": str(rank) for name in ("RANK", "LOCAL_RANK")}
    own |= {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with mock.patch.dict(os.environ, own):
        main([str(run), "--data-root", str(miniature), "--k", "2", "--tasks", "mmvet"])
    assert ("note: mmvet is scored by another model" in capsys.readouterr().out) == (rank == 0)


def test_a_run_answers_tasks_of_both_harnesses(run, miniature, capsys):  # noqa: F811
    """What it trained, at a budget, and the untouched model; then one task more."""
    options = ["data.max_length=96", "--data-root", str(miniature), "--k", "2", "--limit", "2"]
    options += ["--calibrate-tasks", "mmlu_anatomy", "--mean-k", "2"]
    main([str(run), *options, "--tasks", "mmlu_anatomy", "mme"])
    out = run / "benchmarks"
    assert sorted(path.name for path in out.iterdir()) == ["k_2", "mean_k_2"]
    untouched, trained = read_mode(out / "k_2"), read_mode(out / "mean_k_2")
    assert (untouched.method, untouched.k, untouched.checkpoint) == ("top_k", 2, None)
    assert (trained.method, trained.k, trained.budget_k) == ("gemoe", None, 2.0)
    assert trained.checkpoint and trained.num_layers == 2 and trained.dtype == "float32"
    asked = json.loads((out / "k_2/mmlu_anatomy/asked.json").read_text())
    assert (asked["harness"], asked["num_documents"], asked["num_requests"]) == ("lm_eval", 2, 8)
    assert asked["choices"]["limit"] == 2 and "prompt_style" not in asked["choices"]
    asked = json.loads((out / "k_2/mme/asked.json").read_text())
    assert asked["choices"]["prompt_style"] == "default"
    lines = (out / "mean_k_2/mme/answers.jsonl").read_text().splitlines()
    assert len(lines) == 2 and "text" in json.loads(lines[0])
    capsys.readouterr()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("answers.jsonl")}
    main([str(run), *options, "--tasks", "mmlu_anatomy", "mme", "mmlu_virology"])
    said = capsys.readouterr().out
    assert said.count("mmlu_virology: 8 answers to 2 documents") == 2 and "mme:" not in said
    assert "passes" not in said  # the budget is the one that was found
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    line = refused(capsys, run, *options, "--tasks", "mme", "--num-fewshot", "1")
    assert "none of --tasks is a language task" in line
    shutil.rmtree(out)


def test_a_signal_is_exit_code_75(run, miniature, capsys, monkeypatch):  # noqa: F811
    stop = StopRequest()
    stop.by = "SIGUSR1"
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    words = ["--tasks", "mmlu_anatomy", "--data-root", str(miniature)]
    main([str(run), *words], stop)
    assert codes == [75]
    assert "SIGUSR1 to rank 0, between two blocks; the same command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RECIPE", "--tasks", "mme", "--k", "2"], "--out is where the answers go"),
        (["FOLDER", "--tasks", "mme"], "is no run: it has no config.yaml"),
        (["nowhere", "--tasks", "mme"], "nowhere: no such file or folder"),
        (["RECIPE", "--tasks", "mme", "--out", "OUT"], "give --trained RUN"),
        (["RUN", "--tasks", "mme", "--batch", "0"], "neither auto nor a number of tokens"),
        (["RUN", "--tasks", "mme", "--batch", "1e4"], "neither auto nor a number of tokens"),
        (["RUN", "--tasks", "mme", "--limit", "0"], "is not a number from 1"),
        (["RUN", "--tasks", "mme", "--prompt-style", "moolmo"], "molmo"),
        (["RUN", "--tasks", "mme", "--per-layer"], "--per-layer says how --mean-k is met"),
        (["RUN", "--tasks"], "expected at least one argument"),
        (["RUN", "--tasks", "mmlu_anatomy", "--apply-chat-template"], "no chat template"),
        (["RUN", "--tasks", "mmlu_anatomy", "--data-root", "OUT"], "no such folder"),
    ],
)
def test_wrong_options_are_one_line(words, message, run, tmp_path, capsys):
    known = {"RECIPE": run.parent / "recipe.yaml", "RUN": run, "OUT": tmp_path / "out"}
    known["FOLDER"] = tmp_path
    assert message in refused(capsys, *(known.get(word, word) for word in words))
