"""Folders that are not as they should be: one line that names the file and the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemoe_ds.analysis.benchmarks.collect import find_modes, read_modes
from gemoe_ds.analysis.benchmarks.files import ShownAnswer, read_shown, shown_line
from gemoe_ds.analysis.benchmarks.groups import models_of
from gemoe_ds.analysis.benchmarks.tables import build_results
from gemoe_ds.errors import DataError, GemoeError
from tests.analysis.benchmarks.folders import (
    demo_run,
    mode_of,
    right_of,
    routing_of,
    write_mode,
    write_task,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return demo_run(tmp_path / "run", {"gsm8k": 12, "pope": 10}, seeds=1)


def test_runs_out_folders_and_modes_are_found_once(run: Path) -> None:
    modes = [path.name for path in find_modes([run])]
    assert modes == ["k_2", "k_4", "trained_0"]
    assert find_modes([run / "benchmarks"]) == find_modes([run, run / "benchmarks/k_2"])
    assert [path.name for path in find_modes([run / "benchmarks/trained_0"])] == ["trained_0"]


def edit(name: str, **changed: object) -> Callable[[Path], None]:
    def change(task: Path) -> None:
        path = task / name if (task / name).exists() else task.parent / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def arrays(**changed: np.ndarray) -> Callable[[Path], None]:
    def change(task: Path) -> None:
        with np.load(task / "scored.npz") as found:
            np.savez(task / "scored.npz", **{**found, **changed})

    return change


def cut(name: str) -> Callable[[Path], None]:
    return lambda task: (task / name).write_bytes((task / name).read_bytes()[:50])


IDS, RIGHT = np.arange(12), np.ones(12)
FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda task: (task.parent / "mode.json").write_text("{"), "mode.json is damaged (Invalid"),
    (edit("mode.json", method="Ge MoE"), "mode.json is damaged (method"),
    (edit("mode.json", parameters_per_expert=[]), "mode.json is damaged (parameters_per_expert"),
    (edit("mode.json", parameters_per_expert=[1] * 9), "(layers, experts) = (3, 8)"),
    (edit("mode.json", more=1), "mode.json is damaged (more: Extra"),
    (cut("scores.json"), "scores.json is damaged"),
    (edit("scores.json", num_documents=0), "scores.json is damaged (num_documents"),
    (edit("scores.json", num_documents=11), "scored.npz is damaged (12 documents, scores.json"),
    (edit("scores.json", metrics={"acc,none": "N/A"}), "metrics hold no number"),
    (edit("scores.json", metrics={"acc,none": 0.5}), "no number 'exact_match,strict-match'"),
    (lambda task: (task / "scored.npz").unlink(), "scored.npz is missing: run `gemoe benchmark s"),
    (cut("scored.npz"), "scored.npz is damaged"),
    (lambda task: (task / "scored.npz").write_bytes(b""), "scored.npz is damaged"),
    (arrays(right_N=RIGHT[:4]), "scored.npz is damaged (doc_id_N (12,) and right_N (4,)"),
    (arrays(right_N=np.full(12, np.nan)), "a score is not finite"),
    (arrays(doc_id_N=np.zeros(12, int)), "a document is there twice"),
    (arrays(doc_id_N=IDS * 0.5), "scored.npz is damaged"),
    (arrays(doc_id_N=IDS + 1), "answered other documents"),
    (lambda task: (task / "routing.npz").unlink(), "routing.npz is missing: run `gemoe benchmark"),
    (cut("routing.npz"), "routing.npz is damaged"),
    (edit("scores.json", choices={"num_fewshot": 5}), "has choices = {'num_fewshot': 5}"),
    (edit("scores.json", harness="lm_eval 0.4.12"), "has harness = lm_eval 0.4.12"),
    (edit("mode.json", backbone_k=2), "has backbone_k = 2"),
    (lambda task: (task / "shown.jsonl").write_text("{}\n"), "shown.jsonl is damaged (Field req"),
    (lambda task: (task / "shown.jsonl").write_bytes(b"\xff\xfe"), "shown.jsonl is damaged"),
]  # fmt: skip


@pytest.mark.parametrize("fault, says", FAULTS)
def test_a_fault_is_one_line(run: Path, fault: Callable[[Path], object], says: str) -> None:
    fault(run / "benchmarks/trained_0/gsm8k")
    with pytest.raises(GemoeError) as caught:
        build_results(read_modes([run]), command="")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_to_show_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, says in (("empty", "holds no benchmarks"), ("nowhere", "is not there")):
        with pytest.raises(DataError, match=says):
            read_modes([tmp_path / folder])
    mode = write_mode(tmp_path / "out", "k_4", mode_of("top_k", 4), {})
    (mode / "gsm8k").mkdir()
    (mode / "gsm8k/answers.jsonl").touch()
    with pytest.raises(DataError, match="is scored: run `gemoe benchmark score`"):
        read_modes([tmp_path / "out"])
    write_task(mode / "hellaswag", np.ones(4), mode_of("top_k", 4))
    with pytest.raises(
        DataError, match="none of the 1 tasks .hellaswag. is a benchmark of the pap"
    ):
        build_results(read_modes([tmp_path / "out"]), command="")


def test_the_same_mode_in_two_places(tmp_path: Path) -> None:
    """Tasks are put together; of a task that is in both, the scores must be the same."""
    right = right_of(np.random.default_rng(0), 20, 0.5)
    mode = mode_of("top_k", 4)
    write_mode(tmp_path / "one", "k_4", mode, {"gsm8k": right})
    write_mode(tmp_path / "two", "k_4", mode, {"gsm8k": right, "mmlu_virology": right})
    (found,) = read_modes([tmp_path / "one", tmp_path / "two"])
    assert sorted(found.tasks) == ["gsm8k", "mmlu_virology"]
    write_mode(tmp_path / "three", "k_4", mode, {"gsm8k": 1 - right[:19]})
    with pytest.raises(DataError, match="are the same way to route with other scores"):
        read_modes([tmp_path / "one", tmp_path / "three"])


def test_two_trainings_are_no_row(tmp_path: Path) -> None:
    """Not even where they answered different tasks, which would look like one run's."""
    for name, task in (("a", "gsm8k"), ("b", "pope")):
        mode = mode_of("gemoe", checkpoint=f"runs/{name}/checkpoints/step-000200")
        write_mode(tmp_path / name, "trained", mode, {task: np.ones(3)})
    with pytest.raises(DataError, match="are two trainings of one method with one seed"):
        read_modes([tmp_path / "a", tmp_path / "b"])


def test_a_training_is_known_by_its_weights(tmp_path: Path) -> None:
    """By a digest, where it is noted: a folder may move, and another have its name."""
    place = "runs/{}/checkpoints/step-000200"
    for name, at, digest, task in (
        ("a", "a", "one", "gsm8k"),
        ("moved", "c", "one", "pope"),
        ("next", "a", "two", "pope"),
    ):
        mode = mode_of("gemoe", checkpoint=place.format(at), trained_digest=digest)
        write_mode(tmp_path / name, "trained", mode, {task: np.ones(3)})
    (found,) = read_modes([tmp_path / "a", tmp_path / "moved"])
    assert sorted(found.tasks) == ["gsm8k", "pope"]
    with pytest.raises(DataError, match="are two trainings of one method .* another --name"):
        read_modes([tmp_path / "a", tmp_path / "next"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"training": {"optim.lr": 0.5}}, r"trainings differ in optim.lr \(0.001, 0.5\)"),
        ({"base_digest": "other"}, "has base_digest = other, .* has base"),
        ({}, None),
    ],
)
def test_seeds_differ_in_nothing_else(
    tmp_path: Path, changed: dict[str, object], message: str | None
) -> None:
    known = {"training": {"optim.lr": 0.001}, "base_digest": "base"}
    for seed, more in ((0, {}), (1, changed)):
        mode = mode_of("gemoe", seed=seed, **known | more)
        write_mode(tmp_path / str(seed), "trained", mode, {"gsm8k": np.ones(3)})
    runs = read_modes([tmp_path / "0", tmp_path / "1"])
    if message is None:
        assert len(models_of(runs)[0].groups) == 1
        return
    with pytest.raises(DataError, match=message):
        models_of(runs)


@pytest.mark.parametrize("task", ["mmlu_pro_law", "gsm8k_cot", "ai2d_no_mask", "mmlu", "pope_adv"])
def test_another_task_of_like_name_fills_no_column(tmp_path: Path, task: str) -> None:
    write_mode(tmp_path, "k_4", mode_of("top_k", 4), {task: np.ones(3), "gqa": np.zeros(3)})
    (run,) = read_modes([tmp_path])
    assert set(run.columns) == {"GQA"}


def test_documents_in_any_order_are_joined(tmp_path: Path) -> None:
    mode = write_mode(tmp_path, "k_4", mode_of("top_k", 4), {"gsm8k": np.arange(6) / 6})
    np.savez(mode / "gsm8k/scored.npz", doc_id_N=np.arange(6)[::-1], right_N=np.arange(6)[::-1] / 6)
    (found,) = read_modes([tmp_path])
    assert found.tasks["gsm8k"].documents.right_N == pytest.approx(np.arange(6) / 6)


def test_routing_of_all_parts_is_added(tmp_path: Path) -> None:
    tasks = {"mmlu_virology": np.ones(5), "mmlu_anatomy": np.ones(7)}
    write_mode(tmp_path, "trained", mode_of("gemoe"), tasks)
    (found,) = read_modes([tmp_path])
    parts = [routing_of(number, None) for number in (5, 7)]
    assert (found.routing["MMLU"].load_LE == sum(part.load_LE for part in parts)).all()


def test_shown_answers_come_back_in_order_and_never_too_many(tmp_path: Path) -> None:
    made = [
        ShownAnswer(doc_id=doc, question="\u2028?", tokens=(("a\n", 1.5),)) for doc in range(30)
    ]
    (tmp_path / "shown.jsonl").write_text("\n".join(map(shown_line, made[::-1])), encoding="utf-8")
    assert read_shown(tmp_path) == tuple(made[:20])
    assert read_shown(tmp_path / "nowhere") == ()
