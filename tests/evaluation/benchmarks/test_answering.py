"""Answers that depend on the question alone: not on batches, ranks, or where a run was cut."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from gemoe_ds.analysis.routing_sums import RoutingSums
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.errors import ConfigError, DataError, OutputError, Stopped
from gemoe_ds.evaluation.benchmarks.answering import Answerer, seed_of
from gemoe_ds.evaluation.benchmarks.requests import Answer, Request
from gemoe_ds.models.moe_model import MoEModel
from tests.evaluation.benchmarks.hand_made import HandMade, all_kinds, answer, files, write_recipe
from tests.helpers import run_ranks, start_method
from tests.train.resuming import write_setting

MODES = ("--k", "4", "--router", "score")
SMALL = ("--batch", "150")  # about three documents


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(write_setting(tmp_path_factory.mktemp("answering")))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """All answers, at one go on one rank."""
    out = tmp_path_factory.mktemp("whole")
    answer(recipe, all_kinds(), *MODES, *SMALL, "--out", out)
    return out


def read(out: Path, mode: str, task: HandMade) -> dict[str, Answer]:
    lines = (out / mode / task.name / "answers.jsonl").read_text("utf-8").splitlines()
    found = [Answer.from_json(line) for line in lines]
    assert [one.key for one in found] == sorted(one.key for one in found)
    return {one.key: one for one in found}


def assert_close(out: Path, whole: Path, mode: str, tasks: list[HandMade]) -> None:
    """Texts, counts and greedy flags equal; log-likelihoods but for the order of sums."""
    for task in tasks:
        ours, expected = read(out, mode, task), read(whole, mode, task)
        assert ours.keys() == expected.keys()
        for key, one in ours.items():
            value, other = one.log_likelihood, expected[key].log_likelihood
            assert value == (None if other is None else pytest.approx(other, abs=1e-5))
            same = {"log_likelihood": None}
            assert vars(one) | same == vars(expected[key]) | same


def assert_same_routing(out: Path, whole: Path, mode: str, tasks: list[HandMade]) -> None:
    for task in tasks:
        sums, expected = (
            RoutingSums.load(folder / mode / task.name / "routing.npz") for folder in (out, whole)
        )
        for name, array in vars(expected).items():
            np.testing.assert_array_equal(getattr(sums, name), array, err_msg=name)


def test_every_request_has_an_answer_and_every_document_a_row(whole):
    for task in all_kinds():
        requests = [r for doc in range(task.num_documents) for r in task.requests_of(doc)]
        for mode in ("k_4", "score"):
            found = read(whole, mode, task)
            assert found.keys() == {request.key for request in requests}
            sums = RoutingSums.load(whole / mode / task.name / "routing.npz")
            assert set(sums.doc_id_D) >= {r.doc_id for r in requests if r.context}
            for request in requests:
                one = found[request.key]
                assert (one.doc_id, one.index) == (request.doc_id, request.index)
                assert (one.text is None) == (request.kind != "generate")
                assert (one.is_greedy is None) == (request.kind != "loglikelihood")
                if request.kind == "generate":
                    assert one.prompt_tokens == len(request.context.split())
                    assert request.writing.until[0] not in one.text
                    assert 1 <= one.written_tokens <= request.writing.max_new_tokens
        assert not (whole / "k_4/parts").exists()
    letters = RoutingSums.load(whole / "k_4/hand_letters/routing.npz")
    assert set(letters.k_LN.flatten()) == {4} and letters.written_tokens_D.sum() == 0
    asked = {
        r.doc_id: len(r.context.split()) for d in range(7) for r in all_kinds()[0].requests_of(d)
    }
    assert dict(zip(letters.doc_id_D, letters.prompt_tokens_D, strict=True)) == asked


@pytest.mark.parametrize("batch", ["1", "100000", "auto"])
def test_batches_change_no_answer(batch, recipe, whole, tmp_path):
    answer(recipe, all_kinds(), "--k", "4", "--batch", batch, "--out", tmp_path)
    assert_close(tmp_path, whole, "k_4", all_kinds())
    one, other = (RoutingSums.load(out / "k_4/hand_ends/routing.npz") for out in (tmp_path, whole))
    assert (one.hash_N == other.hash_N).all() and (one.load_MLE == other.load_MLE).all()


def answer_some(rank, recipe, tasks, out, *options, kill_at=None):
    """On a rank; ended by SIGKILL before its `kill_at`th forward."""
    if kill_at is not None:
        hidden, calls = MoEModel.hidden, []

        def forward(self, inputs):
            calls.append(1)
            if len(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return hidden(self, inputs)

        MoEModel.hidden = forward
    answer(recipe, tasks, *options, "--out", out)


def test_two_ranks_give_the_same_files(recipe, whole, tmp_path):
    assert run_ranks(answer_some, 2, recipe, all_kinds(), tmp_path, *MODES, *SMALL) == [None] * 2
    assert files(tmp_path) == files(whole) and len(files(whole)) == 10
    for mode in ("k_4", "score"):
        assert_same_routing(tmp_path, whole, mode, all_kinds())


def killed(recipe, out, kill_at):
    process = start_method().Process(
        target=answer_some,
        args=(0, recipe, all_kinds(), out, "--k", "4", *SMALL),
        kwargs={"kill_at": kill_at},
    )
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL


def test_a_run_that_is_killed_goes_on(recipe, whole, tmp_path):
    """Twice killed on one rank, then on two: the same bytes."""
    killed(recipe, tmp_path, 6)
    started = {path.name for path in (tmp_path / "k_4/parts/000").iterdir()}
    assert any(name.endswith(".npz") for name in started)
    killed(recipe, tmp_path, 17)
    assert run_ranks(answer_some, 2, recipe, all_kinds(), tmp_path, "--k", "4", *SMALL)
    of_k = {name.removeprefix("k_4/"): text for name, text in files(whole).items() if "k_4" in name}
    assert files(tmp_path / "k_4") == of_k
    assert_same_routing(tmp_path, whole, "k_4", all_kinds())


def test_a_signal_ends_it_between_two_blocks(recipe, whole, tmp_path, monkeypatch):
    stop, number = StopRequest(), []
    batch = Answerer._batch

    def counted(self, *of):
        number.append(1)
        if len(number) == 5:
            stop.by = "SIGTERM"
        return batch(self, *of)

    monkeypatch.setattr(Answerer, "_batch", counted)
    with pytest.raises(Stopped, match="SIGTERM to rank 0, between two blocks"):
        answer(recipe, all_kinds(), *MODES, *SMALL, "--out", tmp_path, stop=stop)
    assert len(number) == 5
    answer(recipe, all_kinds(), *MODES, *SMALL, "--out", tmp_path)
    assert files(tmp_path) == files(whole)
    blocks = len(number)
    number[:] = [0] * 10
    answer(recipe, all_kinds(), *MODES, *SMALL, "--out", tmp_path / "again")
    assert len(number) - 10 == blocks  # nothing was answered twice


def test_ranks_that_share_experts(recipe, whole, tmp_path):
    options = ("--k", "4", *SMALL, "parallel.ep_size=2")
    assert run_ranks(answer_some, 2, recipe, all_kinds(), tmp_path, *options) == [None] * 2
    assert_close(tmp_path, whole, "k_4", all_kinds())
    for task in all_kinds():
        one, other = (
            RoutingSums.load(out / "k_4" / task.name / "routing.npz") for out in (tmp_path, whole)
        )
        assert (one.tokens_M == other.tokens_M).all() and (one.doc_id_D == other.doc_id_D).all()


def test_ranks_that_share_experts_go_on_from_a_round_that_all_have(recipe, tmp_path):
    """The second rank dies; what the others compute with depends on who is there in a round."""
    options = ("--k", "4", *SMALL, "parallel.ep_size=2")
    assert run_ranks(answer_some, 2, recipe, all_kinds(), tmp_path / "whole", *options)
    with pytest.raises(AssertionError):
        run_ranks(die_on_second, 2, recipe, all_kinds(), tmp_path / "cut", *options)
    assert (tmp_path / "cut/k_4/parts").exists()
    assert run_ranks(answer_some, 2, recipe, all_kinds(), tmp_path / "cut", *options)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert_same_routing(tmp_path / "cut", tmp_path / "whole", "k_4", all_kinds())


def die_on_second(rank, *of):
    answer_some(rank, *of, kill_at=23 if rank else None)


@pytest.mark.parametrize("ep", [1, 2])
def test_more_ranks_than_documents(ep, recipe, tmp_path):
    tasks = [HandMade("ends", 1), HandMade("greedy", 1), HandMade("letters", 0)]
    options = ("--k", "4", f"parallel.ep_size={ep}")
    assert run_ranks(answer_some, 2, recipe, tasks, tmp_path, *options) == [None] * 2
    answer(recipe, tasks, "--k", "4", "--out", tmp_path / "alone")
    assert_close(tmp_path, tmp_path / "alone", "k_4", tasks)


def test_a_batch_that_memory_has_no_room_for_is_halved(
    recipe, whole, tmp_path, monkeypatch, capsys
):
    hidden = MoEModel.hidden

    def small(self, inputs):
        if inputs.input_ids_BS.numel() > 90:
            raise torch.OutOfMemoryError("out of memory")
        return hidden(self, inputs)

    monkeypatch.setattr(MoEModel, "hidden", small)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    tasks = all_kinds()[:2]
    answer(recipe, tasks, "--k", "4", "--batch", "500", "--out", tmp_path)
    assert "out of memory: goes on with --batch" in capsys.readouterr().out
    assert_close(tmp_path, whole, "k_4", tasks)
    sums = RoutingSums.load(tmp_path / "k_4/hand_ends/routing.npz")
    assert (sums.tokens_M == RoutingSums.load(whole / "k_4/hand_ends/routing.npz").tokens_M).all()
    with pytest.raises(ConfigError, match="do not fit into memory alone"):
        answer(recipe, [HandMade("rolling", 1)], "--k", "4", "--out", tmp_path / "one")


def test_what_was_answered_by_another_model_or_otherwise_is_refused(recipe, whole):
    kept = files(whole)
    for words, message in (
        ((*MODES, "model.dtype=bfloat16"), "its dtype is float32, not bfloat16"),
        ((*MODES, "seed=5"), "its seed is 0, not 5"),
        ((*MODES, "data.max_length=60"), "other questions"),
        (("--router", "{name: score, k_low: 2}"), "its router is .*'k_low': 1.*, not .*'k_low': 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            answer(recipe, all_kinds(), *words, "--out", whole)
    with pytest.raises(ConfigError, match="hand_greedy holds answers to other questions"):
        answer(recipe, [HandMade("greedy", 7, seed=1)], *MODES, "--out", whole)
    answer(recipe, all_kinds(), *MODES, "--out", whole)  # nothing left to do
    assert files(whole) == kept


def test_parts_of_a_task_stay_while_others_are_answered(recipe, whole, tmp_path):
    """And a folder that cannot be written to is one line."""
    killed(recipe, tmp_path, 6)
    answer(recipe, all_kinds()[1:2], "--k", "4", *SMALL, "--out", tmp_path)
    assert (tmp_path / "k_4/parts").exists()
    answer(recipe, all_kinds(), "--k", "4", *SMALL, "--out", tmp_path)
    assert not (tmp_path / "k_4/parts").exists()
    assert files(tmp_path / "k_4") == files(whole / "k_4")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/k_4").write_text("")
    with pytest.raises(OutputError, match="k_4 cannot be written to: .*; what is answered stays"):
        answer(recipe, all_kinds(), "--k", "4", "--out", tmp_path / "full")


def test_a_budget_is_met_on_prompts_and_kept(recipe, tmp_path, monkeypatch):
    tasks = all_kinds(9)
    options = ("--router", "{name: score, k_low: 1}", "--mean-k", "2.5", "--out", tmp_path)
    with pytest.raises(ConfigError, match="not both"):
        answer(recipe, tasks, *options, "--calibrate", tmp_path, known=tasks)
    with pytest.raises(ConfigError, match="--mean-k 99 cannot be met"):
        answer(recipe, tasks, "--k", "4", *options, "--mean-k", "2.5", "99", known=tasks)
    assert not files(tmp_path), "found before anything was answered"
    answer(recipe, tasks[:1], *options, "--per-layer", known=tasks)
    folder = tmp_path / "score_mean_k_2.5"
    assert json.loads((folder / "budget.json").read_text())["mean_k"] == pytest.approx(
        2.5, rel=0.02
    )
    assert json.loads((folder / "mode.json").read_text())["budget_k"] == 2.5
    monkeypatch.setattr("gemoe_ds.evaluation.session.fit_budget_to", None)
    answer(recipe, tasks, *options, "--per-layer", known=tasks)
    assert len(files(folder)) == 5


def test_what_cannot_be_asked_is_said_before_a_model_is_read(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("gemoe_ds.evaluation.benchmarks.answer_modes.EvalSession", None)
    tasks = [HandMade("greedy", 3)]
    with pytest.raises(DataError, match="answers of up to . tokens .* raise data.max_length"):
        answer(recipe, tasks, "--k", "4", "data.max_length=4", "--out", tmp_path)
    with pytest.raises(ConfigError, match="--mean-k is met on samples, and"):
        words = ("--router", "score", "--mean-k", "3", "data.train_path=/none")
        answer(recipe, tasks, *words, "--out", tmp_path)
    with pytest.raises(ConfigError, match="model.trainable=all has changed more than its routers"):
        words = ("--trained", tmp_path / "run", "model.trainable=all", "--out", tmp_path)
        answer(recipe, tasks, "--k", "4", *words)
    with pytest.raises(ConfigError, match="--calibrate-tasks says how"):
        answer(recipe, tasks, "--k", "4", "--out", tmp_path, known=tasks)


def test_a_seed_of_its_own():
    request = Request("task", 1, 0, "generate", "a")
    other = Request("task", 1, 1, "generate", "a")
    assert len({seed_of(0, request), seed_of(1, request), seed_of(1, other)}) == 3
