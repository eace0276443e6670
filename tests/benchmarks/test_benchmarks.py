"""`python -m benchmarks` from end to end on a small shape: rows, counters, page, trace."""

from __future__ import annotations

import gzip
import json
import os
import time
from unittest.mock import patch

import pytest
import torch

from benchmarks import suites, timing
from benchmarks.__main__ import main
from gemoe_ds.engine.malloc import MOST_KERNELS, bound_kernel_caches
from gemoe_ds.engine.world import World
from tests.helpers import run_here, run_python

FAST = ["--shape", "demo", "--tokens", "96", "--rounds", "1"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "bench_cpu.json"
    suites = ["layer", "stages", "ep", "timeline", "--ep", "2"]
    done = run_python("-m", "benchmarks", "--suites", *suites, *FAST, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads(out.read_text()), done.stdout


def test_every_row_was_checked_and_timed(results):
    _, data, _ = results
    layers = [row for row in data["rows"] if row["suite"] in ("layer", "ep")]
    assert {row["mode"] for row in layers} == {"forward", "frozen", "trainable"}
    peers = {"autoep", "autoep_grouped", "autoep_padded", "hf_eager", "hf_grouped"}
    assert {row["layer"] for row in layers} == {*peers, "gemoe_ds", "dense product", "router alone"}
    for row in layers:
        assert row["ms"] > 0 and row["tokens"] == 96
        if row["layer"] not in ("dense product", "router alone"):
            assert 0 < max(row["errors"].values()) < 0.02
    # 96 tokens each get a whole number of experts: the mean is as near as that allows
    ours = sorted({round(r["mean_k"]) for r in layers if r["layer"] == "gemoe_ds"})
    assert ours == list(range(1, 9))


def test_sent_bytes_are_counted(results):
    _, data, _ = results
    ours = [r for r in data["rows"] if r["suite"] == "ep" and r["layer"] == "gemoe_ds"]
    assert ours
    for row in ours:
        traffic = row["traffic"]
        assert traffic["row_bytes"] == 2 * traffic["pairs"] * 64 * 2  # D = 64 in bf16
        assert 0 < traffic["pairs"] <= 96
        forwarded = traffic["row_bytes_if_every_assignment_travelled"]
        assert forwarded >= traffic["row_bytes"] * (1.5 if row["mean_k"] > 3 else 1)


def test_contenders_do_not_push_out_each_others_kernels():
    with patch.dict(os.environ, clear=True):
        timing.keep_kernels()
        bound_kernel_caches()  # as every run of ours does
        assert int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) > 10 * MOST_KERNELS
        assert int(os.environ["LRU_CACHE_CAPACITY"]) > 10 * MOST_KERNELS
    with patch.dict(os.environ, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9"}, clear=True):
        timing.keep_kernels()  # the user's own stays
        assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "9"


def test_page_names_its_source_and_what_was_not_run(results):
    out, data, printed = results
    page = out.with_suffix(".md").read_text()
    assert page in printed
    assert data["command"].startswith("python -m benchmarks --suites layer stages ep")
    assert data["command"] in page and data["machine"] in page
    assert "Not run on a GPU" in page
    assert {row["of"] for row in data["cost_model"]["compared"]} == {"fit"}


def test_the_trace_shows_the_shared_expert_between_start_and_wait(results):
    out, data, _ = results
    (row,) = (row for row in data["rows"] if row["suite"] == "timeline")
    shared = next(span for span in row["spans"] if span["name"] == "shared expert")
    around = [
        span
        for span in row["spans"]
        if span["name"] == "all_to_all"
        and span["start"] <= shared["start"]
        and span["end"] >= shared["end"]
    ]
    assert len(around) == 2, "the rows and their metadata"
    with gzip.open(out.with_name("bench_cpu_trace.json.gz"), "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"shared expert", "all_to_all: start", "all_to_all: wait"} <= names


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--out", "nowhere.md"), "must end in .json"),
        (("--rounds", "0"), "are 1 at least"),
        (("--mean-ks", "1", "5.1"), "8 among them, with which the others are compared"),
        (("--cpu-seconds", "--suites", "ep"), "ep is about waiting, which takes none"),
    ],
)
def test_bad_flags_cost_one_line(flags, words):
    done = run_here(main, "--suites", "layer", *flags)
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("shape, own", [("olmoe", 8), ("deepseek_vl2_tiny", 6)])
def test_of_trainable_experts_the_backbone_s_own_k_is_timed_too(monkeypatch, shape, own):
    timed = {}
    monkeypatch.setattr(suites, "_layer", lambda *given: timed.update({given[6]: given[5]}) or [])
    options = suites.Options(shape, 96, torch.float32, 1)
    suites.layer_suite(options, World(0, 1, torch.device("cpu")))
    assert timed["trainable"] == [5.1, own] and max(timed["frozen"]) == own


def test_cpu_seconds_leave_waiting_out(monkeypatch):
    monkeypatch.setattr(timing, "_clock", time.perf_counter)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    (wall,), (cpu,) = (
        timing.measure({"sleep": lambda: time.sleep(0.2)}, 1)["sleep"].seconds
        for change in (lambda: None, timing.use_cpu_seconds)
        if change() is None
    )
    assert wall >= 0.2 > 0.1 > cpu
