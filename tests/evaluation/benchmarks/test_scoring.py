"""Stored answers through the stock evaluators: gold gets full marks, and every guard holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from gemoe_ds.analysis.benchmarks.collect import read_modes
from gemoe_ds.analysis.benchmarks.columns import COLUMNS
from gemoe_ds.analysis.benchmarks.files import MODE, SCORES, read_scored, read_scores
from gemoe_ds.errors import ConfigError, DataError
from gemoe_ds.evaluation.benchmarks import needs
from gemoe_ds.evaluation.benchmarks.answered import ANSWERS
from gemoe_ds.evaluation.benchmarks.load_tasks import SETS
from gemoe_ds.evaluation.benchmarks.local_data import DataPlaces
from gemoe_ds.evaluation.benchmarks.requests import Answer, Request
from gemoe_ds.evaluation.benchmarks.score_modes import ScoreOptions, score_all
from gemoe_ds.evaluation.benchmarks.task_options import TaskOptions
from tests.analysis.benchmarks.folders import mode_of, routing_of
from tests.evaluation.benchmarks.gold import answer_with, right
from tests.evaluation.benchmarks.miniature import write_miniature

LANGUAGE = ["gsm8k", "mmlu_anatomy", "bbh_cot_fewshot_navigate", "hellaswag", "humaneval"]
FULL = {
    "mmbench_en_dev_static": {"gpt_eval_score,none": 100.0},
    "pope": {"pope_f1_score,none": 1.0, "pope_accuracy,none": 1.0},
    "scienceqa_img": {"exact_match,none": 1.0},
    "textvqa_val": {"exact_match,none": 1.0},
    "gqa": {"exact_match,none": 1.0},
    "mmmu_val": {"mmmu_acc,none": 1.0},
    "ai2d": {"exact_match,flexible-extract": 1.0},
    "infovqa_val": {"anls,none": 1.0},
    "mmstar": {"average,none": 1.0},
    "realworldqa": {"exact_match,none": 1.0},
    "ocrbench": {"ocrbench_accuracy,none": 0.007},
    "vqav2_val": {"exact_match,none": 1.0},
    "mme": {"mme_perception_score,none": 200.0, "mme_cognition_score,none": 200.0},
    "gsm8k": {"exact_match,strict-match": 1.0, "exact_match,flexible-extract": 1.0},
    "mmlu_anatomy": {"acc,none": 1.0},
    "bbh_cot_fewshot_navigate": {"exact_match,get-answer": 1.0},
    "hellaswag": {"acc,none": 1.0, "acc_norm,none": 1.0},
    "humaneval": {"pass@1,create_test": 1.0},
}


class Bench:
    """Answers and scores in a folder of its own."""

    def __init__(self, data: Path, out: Path) -> None:
        self.data, self.out, self.said = DataPlaces(data), out, list[str]()

    def answer(self, *names: str, mode: str = "trained", **more: Any) -> None:
        options = TaskOptions(data=self.data, **more.pop("options", {}))
        answer_with(self.out, names, options, mode=mode, **more)

    def score(self, **options: Any) -> None:
        self.said.clear()
        score_all([self.out], ScoreOptions(data=self.data, **options), self.said.append)

    def metrics(self, task: str, mode: str = "trained") -> dict[str, Any]:
        return read_scores(self.out / mode / task).metrics

    def right(self, task: str, mode: str = "trained") -> list[float]:
        folder = self.out / mode / task
        return read_scored(folder, read_scores(folder).num_documents).right_N.tolist()

    @property
    def warnings(self) -> list[str]:
        return [text for text in self.said if text.startswith("warning:")]


@pytest.fixture
def bench(miniature: Path, tmp_path: Path) -> Bench:
    return Bench(miniature, tmp_path / "out")


def saying(choose: Callable[[Request], str | None]) -> Callable[[Any, Request], Answer]:
    """Gold, but where `choose` says something."""

    def answer(task: Any, request: Request) -> Answer:
        text, gold = choose(request), right(task, request)
        return gold if text is None else replace(gold, text=text)

    return answer


def test_gold_answers_get_full_marks(bench: Bench) -> None:
    vision = [*SETS["paper-vision"], *SETS["paper-more"]]
    bench.answer(*(name for name in vision if name != "mmvet"), *LANGUAGE)
    bench.score(may_run_code=True)
    for task, expected in FULL.items():
        found = bench.metrics(task)
        assert {key: found[key] for key in expected} == expected, task
        assert set(bench.right(task)) == {1.0}, task
    assert bench.warnings == [
        "warning: trained/ocrbench: the harness divides by 1,000 questions, and 7 were asked"
    ]
    filled = {column.heading: column for column in COLUMNS for task in FULL if column.has(task)}
    assert {column.heading for column in COLUMNS} - filled.keys() == {"MM-Vet"}
    for task in FULL:
        for column in filter(lambda one: one.has(task), filled.values()):
            full = {"OCRBench": (0.7,), "MME": (200.0, 200.0, 400.0)}.get(column.heading, (100.0,))
            assert column.values(read_scores(bench.out / "trained" / task)) == pytest.approx(full)
    scores = read_scores(bench.out / "trained" / "gsm8k")
    assert (scores.harness, scores.version) == ("lm_eval 0.4.13", 3.0)
    assert scores.choices["num_fewshot"] == 5 and scores.software["lm_eval"] == "0.4.13"
    assert not list(Path.cwd().glob("submissions"))
    assert_tables_take_them(bench.out / "trained")


def assert_tables_take_them(folder: Path) -> None:
    """Every column of the paper, by `gemoe benchmark tables`."""
    (folder / MODE).write_text(mode_of("gemoe").model_dump_json())
    for path in folder.glob(f"*/{SCORES}"):
        routing_of(read_scores(path.parent).num_documents, None).save(path.with_name("routing.npz"))
    (run,) = read_modes([folder])
    found = {c.heading: run.values(c)[-1] for c in COLUMNS if c.heading in run.columns}
    full = dict.fromkeys((column.heading for column in COLUMNS), 100.0) | {"OCRBench": 0.7}
    assert found == pytest.approx(
        {name: full[name] for name in full if name != "MM-Vet"} | {"MME": 400}
    )
    means = {column.heading for column in COLUMNS if run.columns.get(column.heading)
             and run.right(column) is not None}  # fmt: skip
    assert means == found.keys() - {"MMB", "POPE", "OCRBench", "MME"}


def test_scores_document_by_document(bench: Bench) -> None:
    """Every second answer is wrong, and turns of MMBench's questions count together."""

    def choose(request: Request) -> str | None:
        if request.task == "mmbench_en_dev_static":
            return "D" if request.doc_id in (1, 6) else None
        return "nothing" if request.doc_id % 2 else None

    def answer(task: Any, request: Request) -> Answer:
        found = saying(choose)(task, request)
        if request.kind == "loglikelihood" and request.doc_id % 2:
            return replace(found, log_likelihood=-1.0 if request.index == 0 else -2.0)
        return found

    names = ["gqa", "gsm8k", "mmlu_anatomy", "hellaswag", "mmbench_en_dev_static", "pope"]
    bench.answer(*names, answer=answer)
    bench.score()
    halves = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    for task in ("gqa", "gsm8k", "mmlu_anatomy", "hellaswag"):
        assert bench.right(task) == halves, task
    assert bench.right("mmbench_en_dev_static") == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert bench.metrics("mmbench_en_dev_static")["gpt_eval_score,none"] == 50.0
    with np.load(bench.out / "trained" / "gsm8k" / "scored.npz") as arrays:
        assert arrays["exact_match,flexible-extract"].tolist() == halves
        assert arrays["doc_id_N"].tolist() == list(range(7))


def test_a_limit_and_a_chat_template(bench: Bench) -> None:
    options = {"limit": 3, "chat_template": lambda messages, **more: str(messages)}
    bench.answer("gsm8k", "pope", options=options)
    bench.score()
    assert bench.right("gsm8k") == bench.right("pope") == [1.0] * 3


def test_sets_and_groups_take_what_was_answered_by_its_own_name(bench: Bench) -> None:
    bench.answer("bbh_cot_fewshot_navigate", "gsm8k", "pope")
    bench.score(tasks=["bbh_cot_fewshot"])
    assert [one.parent.name for one in bench.out.glob("*/*/scores.json")] == [
        "bbh_cot_fewshot_navigate"
    ]
    bench.score(tasks=["paper-language"])
    assert len(list(bench.out.glob("*/*/scores.json"))) == 2


def test_half_a_pair_of_mme_is_named(bench: Bench) -> None:
    bench.answer("mme", options={"limit": 3})
    with pytest.raises(
        DataError, match="^mme: the harness cannot score it .AssertionError: MME on"
    ):
        bench.score()


@pytest.mark.parametrize("said", ["Yes.", "yes, there is"])
def test_pope_s_other_answers_are_told(bench: Bench, said: str) -> None:
    """F1 is of the rest alone: 100 here."""
    bench.answer("pope", answer=saying(lambda one: said if one.doc_id < 4 else None))
    bench.score()
    (told,) = bench.warnings
    assert "4 of 9 answers are not yes or no and nothing else" in told
    assert bench.metrics("pope")["pope_accuracy,none"] == pytest.approx(5 / 9)
    assert bench.metrics("pope")["pope_f1_score,none"] == 1


def test_standard_errors_are_those_of_the_harness(bench: Bench) -> None:
    bench.answer("gsm8k", answer=saying(lambda one: "?" if one.doc_id < 2 else None))
    bench.score()
    found = bench.metrics("gsm8k")
    right, number = 5 / 7, 7  # the sample deviation of the mean, as lm-eval's mean_stderr
    expected = (right * (1 - right) / (number - 1)) ** 0.5
    assert found["exact_match_stderr,strict-match"] == pytest.approx(expected)


def test_mmmu_s_guesses_are_counted_and_the_same_again(bench: Bench) -> None:
    bench.answer("mmmu_val", answer=saying(lambda one: "?" if one.doc_id in (1, 5) else None))
    bench.score()
    first = bench.right("mmmu_val")
    assert "2 of 7 answers could not be read" in bench.warnings[0]
    bench.score()
    assert bench.right("mmmu_val") == first


def test_ocrbench_s_sums_start_anew(bench: Bench) -> None:
    for mode in ("k_8", "trained"):
        bench.answer("ocrbench", mode=mode)
    bench.score()
    for mode in ("k_8", "trained"):
        assert bench.metrics("ocrbench", mode)["ocrbench_accuracy,none"] == 0.007


def test_control_characters_do_not_end_mmbench(bench: Bench) -> None:
    bench.answer("mmbench_en_dev_static", answer=saying(lambda one: "A\x00\x0b" * 2))
    bench.score()
    assert (bench.out / "trained/mmbench_en_dev_static/submissions").is_dir()


def test_code_runs_only_if_the_user_says_so(bench: Bench) -> None:
    wrong = "    return None\n"
    bench.answer("humaneval", answer=saying(lambda one: wrong if one.doc_id == 1 else None))
    with pytest.raises(ConfigError, match="humaneval runs .*--confirm-run-unsafe-code"):
        bench.score()
    assert not list(bench.out.rglob("scores.json"))
    bench.score(may_run_code=True)
    assert bench.metrics("humaneval")["pass@1,create_test"] == pytest.approx(2 / 3)
    assert bench.right("humaneval") == [1.0, 0.0, 1.0]


class Judge(BaseHTTPRequestHandler):
    """A server that speaks as OpenAI's does. It gives stone a half, and no word to glass."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = asked["messages"][0]["content"]
        pred = text.rstrip("|").rpartition("| ")[2]
        grade = {"stone ": "0.5", "glass ": ""}.get(pred, "1.0")
        choices = [{"message": {"content": grade}}]
        body = json.dumps({"model": asked["model"], "choices": choices}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def judge_url(monkeypatch: pytest.MonkeyPatch) -> Any:
    server = HTTPServer(("127.0.0.1", 0), Judge)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_API_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("API_TYPE", "openai")
    monkeypatch.setenv("MODEL_VERSION", "")
    yield
    server.shutdown()
    server.server_close()


def test_a_judge_scores_mm_vet(bench: Bench, judge_url: None) -> None:
    bench.answer("mmvet", answer=saying(lambda one: "stone" if one.doc_id < 3 else "wood"))
    bench.score(judge="a-judge")
    scores = read_scores(bench.out / "trained/mmvet")
    assert scores.metrics["gpt_eval_score,none"] == pytest.approx(100 * 5.5 / 7)
    assert scores.choices["judge"] == "a-judge"
    assert bench.right("mmvet") == [0.5] * 3 + [1.0] * 4


def test_a_judge_of_language_tasks_is_told_where_it_is_asked(
    bench: Bench, judge_url: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if `exact_match` asked one: no language task of today's harness does."""
    monkeypatch.setattr(needs, "_JUDGED", ("exact_match",))
    bench.answer("gsm8k", "mmlu_anatomy")
    bench.score(judge="a-judge")
    told = {
        one: read_scores(bench.out / "trained" / one).choices for one in ("gsm8k", "mmlu_anatomy")
    }
    assert told["gsm8k"]["judge"] == "a-judge" and "judge" not in told["mmlu_anatomy"]


def test_without_a_judge_nothing_is_scored(bench: Bench, monkeypatch: Any) -> None:
    bench.answer("mmvet", "gqa")
    with pytest.raises(ConfigError, match="mmvet is scored by another model: give --judge"):
        bench.score()
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        bench.score(judge="a-judge")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_API_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("API_TYPE", "openai")
    monkeypatch.setenv("MODEL_VERSION", "")
    with pytest.raises(ConfigError, match="--judge a-judge at .*:9 does not answer"):
        bench.score(judge="a-judge")
    assert not list(bench.out.rglob("scores.json"))
    bench.score(tasks=["gqa"])
    assert [path.parent.name for path in bench.out.rglob("scores.json")] == ["gqa"]


def test_a_judge_that_falls_silent_gives_no_zero(bench: Bench, judge_url: None) -> None:
    bench.answer("mmvet", answer=saying(lambda one: "glass" if one.doc_id < 2 else "wood"))
    with pytest.raises(DataError, match="a-judge gave no answer for 2 documents"):
        bench.score(judge="a-judge")
    assert not list(bench.out.rglob("scores.json"))


def test_missing_answers_are_counted(bench: Bench) -> None:
    bench.answer("gsm8k", "gqa")
    path = bench.out / "trained" / "gsm8k" / ANSWERS
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(DataError, match="has 5 of 7 answers: run the same `gemoe benchmark answer"):
        bench.score()
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        bench.score()
    assert not list(bench.out.rglob("scores.json"))


def test_other_data_than_was_answered_is_refused(bench: Bench, tmp_path: Path) -> None:
    bench.answer("gsm8k")
    write_miniature(tmp_path / "other", 9, only=["gsm8k"])
    bench.data = DataPlaces(tmp_path / "other")
    with pytest.raises(DataError, match="document 7 was not asked what it asks now"):
        bench.score()


def test_nothing_to_score(bench: Bench) -> None:
    with pytest.raises(DataError, match="is not there"):
        bench.score()
    bench.answer("gqa")
    with pytest.raises(DataError, match="no answers to these tasks"):
        bench.score(tasks=["gsm8k"])


@pytest.mark.slow
def test_groups_add_up_as_in_the_harness(tmp_path: Path, miniature: Path) -> None:
    """MMLU and BBH whole; the leaves have as many documents as they like."""
    from gemoe_ds.evaluation.benchmarks.load_tasks import resolve

    asked = resolve(["paper-language"])
    names = {
        repository: sorted({one.leaf.data[1] for one in asked if one.leaf.data[0] == repository})
        for repository in ("cais/mmlu", "SaylorTwift/bbh")
    }
    data = write_miniature(
        tmp_path / "data", 3, subjects=names["cais/mmlu"], subsets=names["SaylorTwift/bbh"]
    )
    bench = Bench(data, tmp_path / "out")
    wrong = saying(lambda one: "no" if one.kind == "generate" and one.doc_id == 1 else None)
    bench.answer("paper-language", answer=wrong)
    bench.score(may_run_code=True)
    told = json.loads((bench.out / "trained/groups.json").read_bytes())
    assert told["mmlu"]["acc,none"] == 1.0 and "mmlu_stem" in told
    assert told["bbh_cot_fewshot"]["exact_match,get-answer"] == pytest.approx(2 / 3)
    scored = list((bench.out / "trained").glob("*/scores.json"))
    assert len(scored) == 57 + 27 + 2
    assert read_scores(bench.out / "trained/mmlu_anatomy").choices["num_fewshot"] == 5
