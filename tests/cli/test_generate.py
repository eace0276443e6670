"""launch/generate.py as a process: answers, and what they cost, on one rank and on two."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from gemoe_ds.analysis.routing_sums import RoutingSums
from gemoe_ds.cli.generate import main
from tests.helpers import repository, run_here, run_python, run_ranks
from tests.train.resuming import make_config, train_all, write_data, write_setting


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    setting = write_setting(tmp_path_factory.mktemp("generate"))
    run = setting["root"] / "run"
    assert run_ranks(train_all, 1, [make_config(setting, run, parallel__ep_size=1)]) == [None]
    few = write_data(setting["root"] / "few", number=5, seed=3)
    return run, few, setting["data"]


def words_of(trained, out, *options):
    run, few, data = trained
    return [run / "config.yaml", "--data", few, "--out", out, "--calibrate", data, *options]


def generate(trained, out, *options, launcher=()):
    command = ["launch/generate.py", *words_of(trained, out, *options)]
    if not launcher:
        return run_python(*command)
    command = [sys.executable, *launcher, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=repository())


def answers(folder):
    lines = (folder / "answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_answers_and_costs_on_one_rank_and_on_two(trained, tmp_path):
    """Five samples in batches of three: with two ranks the second has fewer, in the end none."""
    options = ["--trained", trained[0], "--k", "4", "2", "--max-new-tokens", "5"]
    done = generate(trained, tmp_path / "one", *options, "--batch", "3", "--rounds", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    again = [*options, "--batch", "2", "parallel.ep_size=2"]
    done = generate(trained, tmp_path / "two", *again, launcher=two)
    assert done.returncode == 0, done.stderr[-2000:]
    for routing in ("k_4", "k_2", "trained"):
        found = answers(tmp_path / "one" / routing)
        assert [a["id"] for a in found] == [f"s{i}" for i in range(5)]
        assert all(1 <= a["tokens"] <= 5 and a["question"] for a in found)
        assert found == answers(tmp_path / "two" / routing)
        sums, same = (
            RoutingSums.load(tmp_path / n / routing / "routing.npz") for n in ("one", "two")
        )
        assert sums.written_tokens_D.tolist() == [a["tokens"] - 1 for a in found]  # fed back
        assert np.array_equal(sums.load_MLE, same.load_MLE)
        assert np.array_equal(sums.hash_N, same.hash_N) and np.array_equal(sums.k_LN, same.k_LN)
        for name in ("doc_id_D", "prompt_tokens_D", "k_prompt_D", "k_written_D"):
            assert np.array_equal(getattr(sums, name), getattr(same, name)), name
    one, both = (
        json.loads((tmp_path / n / "throughput.json").read_text())["costs"] for n in ("one", "two")
    )
    for cost, same in zip(one, both, strict=True):
        for name in ("samples", "prompt_tokens", "written_tokens", "activated_parameters"):
            assert cost[name] == same[name], name
        assert cost["mean_k_prompts"] == pytest.approx(same["mean_k_prompts"])
        assert cost["written_tokens_per_s"] > 0 and cost["memory_bytes"] > 1e8
    assert [cost["mean_k_written"] for cost in one[:2]] == [4, 2]
    assert len(one[0]["seconds_per_sample_by_round"]) == 2
    assert one[0]["gflops_per_prompt_token"] > one[1]["gflops_per_prompt_token"]
    table = (tmp_path / "one/throughput.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| k = 4", "| k = 2", "| as trained"]


def test_a_budget_is_met_in_every_round(trained, tmp_path):
    options = ["--trained", trained[0], "--mean-k", "2.5", "--rounds", "2", "--limit", "3"]
    done = generate(trained, tmp_path, *options, "--max-new-tokens", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    (cost,) = json.loads((tmp_path / "throughput.json").read_text())["costs"]
    assert cost["mode"] == "mean k 2.5" and cost["samples"] == 3
    assert cost["mean_k_prompts"] == pytest.approx(2.5, abs=0.4)  # met on other samples
    assert done.stdout.count("mean k 2.5") == 2  # found once, and the table


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "(static) or --router NAME"),
        (["--k", "2", "--mean-k", "3"], "--mean-k goes with --trained RUN"),
        (["--k", "2", "--rounds", "0"], "argument --rounds: 0 is not a number from 1 to"),
        (["--k", "2", "--temperature", "nan"], "--temperature is 0 or more"),
    ],
)
def test_wrong_options_are_refused(options, message, trained, tmp_path):
    done = run_here(main, *words_of(trained, tmp_path / "out", *options))
    assert done.returncode == 2 and message in done.stderr, done.stderr[-500:]
    assert not (tmp_path / "out").exists()


def test_a_k_that_the_backbone_has_not_is_refused(trained, tmp_path):
    done = generate(trained, tmp_path / "out", "--k", "9")
    assert done.returncode == 2 and "exceeds the backbone's 8 experts" in done.stderr
    assert not (tmp_path / "out").exists()
