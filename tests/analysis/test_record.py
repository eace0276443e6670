"""Evaluation records: what is written is read back, and what is damaged is named in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gemoe_ds.analysis import record as module
from gemoe_ds.analysis.questions import Questions
from gemoe_ds.analysis.record import (
    EvalRecord,
    TokenSample,
    read_questions,
    read_record,
    read_samples,
    routing_summary,
    spearman,
    write_record,
)
from gemoe_ds.analysis.routing_sums import RoutingSums
from gemoe_ds.analysis.samples import Samples
from gemoe_ds.errors import DataError
from tests.analysis.evaluations import evaluation, record, sums_of


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    made, sums = evaluation("gemoe", None, 0.2)
    write_record(tmp_path / "new" / "folder", made, sums)
    read, tokens = read_record(tmp_path / "new" / "folder")
    assert read == made
    for name, array in vars(TokenSample.of(sums)).items():
        got = getattr(tokens, name)
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "eval.json",
        "routing.npz",
    ]


def test_what_0_1_left_is_read_until_it_is_evaluated_again(tmp_path: Path) -> None:
    made, sums = evaluation("gemoe", None, 0.2)
    (tmp_path / "eval.json").write_text(made.model_dump_json())
    old = vars(TokenSample.of(sums)) | {"k_hist_text_LK": np.full((4, 9), 7)}
    np.savez(tmp_path / "tokens.npz", **old)
    read, tokens = read_record(tmp_path)
    assert read == made and (tokens.k_hist_text_LK == 7).all()
    write_record(tmp_path, made, sums)
    assert (read_record(tmp_path)[1].k_hist_text_LK != 7).any()
    assert not (tmp_path / "tokens.npz").exists()


def test_an_interrupted_write_leaves_no_old_record_beside_new_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, sums = evaluation("gemoe", None, 0.2)
    write_record(tmp_path, made, sums)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        write_record(tmp_path, made, sums)
    with pytest.raises(DataError, match="eval.json is missing: run the evaluation again"):
        read_record(tmp_path)


ASKED = [(2, 0, "x", True), (0, 1, "y", False), (0, 0, "x", False), (1, 0, "x", True)]


def asked_record(**changed: Any) -> EvalRecord:
    values = {"num_questions_by_kind": {"x": 3, "y": 1}} | changed
    return record("top_k", 8, {"x": 2 / 3, "y": 0.0}, **values)


def test_questions_come_back_sorted_and_belong_to_their_record(tmp_path: Path) -> None:
    sums = sums_of(np.ones((2, 3)), np.full((2, 3), 8), np.zeros(3, bool))
    write_record(tmp_path, asked_record(), sums, Questions.of(ASKED))
    found = read_questions(tmp_path, read_record(tmp_path)[0])
    assert found.row_Q.tolist() == [0, 0, 1, 2] and found.turn_Q.tolist() == [0, 1, 0, 0]
    assert found.kinds_C[found.kind_Q].tolist() == ["x", "y", "x", "x"]
    assert found.right_Q.tolist() == [False, False, True, True]
    dtypes = {name: array.dtype for name, array in vars(found).items() if name != "kinds_C"}
    assert dtypes == {"row_Q": "int32", "turn_Q": "int16", "kind_Q": "int16", "right_Q": "bool"}
    write_record(tmp_path, asked_record(), sums)
    with pytest.raises(DataError, match="questions.npz is missing: run the evaluation again"):
        read_questions(tmp_path, asked_record())
    with pytest.raises(ValueError, match="other counts"):
        write_record(tmp_path, asked_record(), sums, Questions.of(ASKED[1:]))


def test_samples_come_back_sorted(tmp_path: Path) -> None:
    sums = sums_of(np.ones((2, 3)), np.full((2, 3), 8), np.zeros(3, bool))
    samples = Samples.of({7: (2.0, 0.5), 3: (1.0, 0.25)})
    write_record(tmp_path, asked_record(), sums, samples=samples)
    found = read_samples(tmp_path)
    assert {name: array.tolist() for name, array in vars(found).items()} == {
        "row_S": [3, 7],
        "entropy_S": [1.0, 2.0],
        "mass_S": [0.25, 0.5],
    }
    np.savez(tmp_path / "samples.npz", **(vars(samples) | {"row_S": np.array([7, 3])}))
    with pytest.raises(DataError, match="sorted, each once"):
        read_samples(tmp_path)
    write_record(tmp_path, asked_record(), sums)
    with pytest.raises(DataError, match="samples.npz is missing"):
        read_samples(tmp_path)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"row_Q": np.array([0, 0, 2, 1], np.int32)}, "not sorted by row and turn"),
        ({"turn_Q": np.array([0, 0, 0, 0], np.int16)}, "not sorted by row and turn, each once"),
        ({"turn_Q": np.array([0, 1, 0], np.int16)}, "different lengths"),
        ({"kind_Q": np.array([0, 2, 0, 0], np.int16)}, "a kind is not one of 2"),
        ({"kind_Q": np.array([0, -1, 0, 0], np.int16)}, "a kind is not one of 2"),
        ({"kind_Q": np.array([0, 0, 0, 1], np.int16)}, "other counts by kind than eval.json's"),
        ({"right_Q": np.array([True, True, True, False])}, "other counts by kind"),
        ({"right_Q": np.array([0, 0, 1, 1])}, "right_Q must be bool"),
        ({"kinds_C": np.array([1, 2])}, "kinds_C text"),
        ({"kinds_C": np.array(["x", "z"])}, "other counts by kind"),
        ({"kinds_C": np.array(["x", "y", "z"])}, "other counts by kind"),
        ({"row_Q": np.array([0.0, 0.0, 1.0, 2.0])}, "must be integers"),
        ({"more": np.zeros(1)}, "unexpected keyword"),
        ({"right_Q": np.array([None] * 4)}, "pickle"),
    ],
)
def test_damaged_questions_are_named_in_one_line(
    tmp_path: Path, changed: dict[str, np.ndarray], expected: str
) -> None:
    np.savez(tmp_path / "questions.npz", **vars(Questions.of(ASKED)) | changed)
    with pytest.raises(DataError, match=expected) as caught:
        read_questions(tmp_path, asked_record())
    assert str(caught.value).startswith(f"{tmp_path}/questions.npz is damaged (")
    assert str(caught.value).endswith("): run the evaluation again")


def edit_json(folder: Path, **changed: Any) -> None:
    path = folder / "eval.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


ONE_LAYER = np.ones((1, 2)), np.ones((1, 2), int), np.zeros(2, bool)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: (f / "eval.json").unlink(), "eval.json is missing"),
        (lambda f: truncate(f / "eval.json"), "eval.json is damaged"),
        (lambda f: edit_json(f, surprise=1), "surprise: Extra inputs"),
        (lambda f: edit_json(f, accuracy=1.5), "accuracy: Input should be less than or equal to 1"),
        (lambda f: edit_json(f, accuracy=0.5), "accuracy 0.5 is not the mean"),
        (lambda f: edit_json(f, mean_k=3.0), "mean_k 3.0 is not the mean"),
        (lambda f: edit_json(f, seconds=float("nan")), "seconds"),
        (lambda f: edit_json(f, entropy_per_layer=[1.0]), "entropy_per_layer has not one entry"),
        (lambda f: edit_json(f, num_questions_by_kind={}), "name different kinds"),
        (lambda f: (f / "routing.npz").unlink(), "routing.npz is missing"),
        (lambda f: truncate(f / "routing.npz"), "routing.npz is damaged"),
        (lambda f: sums_of(*ONE_LAYER).save(f / "routing.npz"), "has 1 layers, eval.json .* 4"),
        (lambda f: (f / "tokens.npz").write_bytes(b"PK"), "tokens.npz is damaged"),
        (lambda f: (f / "tokens.npz").write_bytes(b""), "tokens.npz is damaged"),
        (lambda f: (f / "tokens.npz").write_bytes(b"noise" * 9), "tokens.npz is damaged"),
        (lambda f: np.savez(f / "tokens.npz", k_LN=np.zeros((4, 1))), "tokens.npz is damaged"),
        (
            lambda f: np.savez(
                f / "tokens.npz",
                entropy_LN=np.zeros((3, 5)),
                k_LN=np.zeros((4, 5)),
                is_vision_N=np.zeros(5, bool),
                k_hist_vision_LK=np.zeros((4, 9)),
                k_hist_text_LK=np.zeros((4, 9)),
            ),
            r"entropy_LN is \(3, 5\), not \(4, 5\)",
        ),
    ],
)
def test_a_damaged_folder_is_named_in_one_line(tmp_path: Path, damage: Any, expected: str) -> None:
    write_record(tmp_path, *evaluation("gemoe", None, 0.2))
    read_record(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=expected) as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).endswith(": run the evaluation again")


def test_a_folder_that_is_not_there_and_one_that_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="eval.json is missing"):
        read_record(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="eval.json cannot be read"):
        read_record(tmp_path / "file")


def test_tokens_of_another_number_of_layers_are_not_written(tmp_path: Path) -> None:
    made = record("top_k", 8, {"fact": 0.9})
    with pytest.raises(ValueError, match="not"):
        write_record(tmp_path, made, evaluation("top_k", 8, 0)[1])
    assert list(tmp_path.iterdir()) == []


def test_every_field_without_a_default_is_required() -> None:
    values = record("top_k", 8, {"fact": 0.9}).model_dump()
    for name, field in EvalRecord.model_fields.items():
        if field.is_required():
            with pytest.raises(ValidationError, match=name):
                EvalRecord(**{key: value for key, value in values.items() if key != name})


pairs = st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 8)), min_size=2, max_size=40)


@given(pairs)
@settings(max_examples=150, deadline=None)
def test_spearman_equals_scipy_with_ties_and_is_none_where_undefined(
    values: list[tuple[int, int]],
) -> None:
    x_N, y_N = (np.array(column) for column in zip(*values, strict=True))
    rho = spearman(x_N / 7, y_N)
    if len(set(x_N)) == 1 or len(set(y_N)) == 1:
        assert rho is None
    else:
        assert rho == pytest.approx(scipy.stats.spearmanr(x_N, y_N).statistic, abs=1e-12)


def test_spearman_of_many_tokens() -> None:
    rng = np.random.default_rng(0)
    entropy_N = rng.random(50_000).astype(np.float32)
    k_N = np.rint(8 * entropy_N + rng.standard_normal(50_000)).astype(np.int8)
    expected = scipy.stats.spearmanr(entropy_N, k_N).statistic
    assert spearman(entropy_N, k_N) == pytest.approx(expected, abs=1e-12)


def test_spearman_by_hand() -> None:
    # Ranks 1 2 3 4 and 1.5 1.5 3 4: covariance 4.5, variances 5 and 4.5.
    rho = spearman(np.array([0.1, 0.2, 0.3, 0.4]), np.array([5, 5, 6, 9]))
    assert rho == pytest.approx(4.5 / np.sqrt(5 * 4.5))
    assert spearman(np.array([1.0, 2.0]), np.array([3, 3])) is None
    assert spearman(np.array([1.0]), np.array([3])) is None
    assert spearman(np.array([]), np.array([])) is None
    with pytest.raises(ValueError, match="one length"):
        spearman(np.zeros(3), np.zeros(4))


def test_what_figures_show_of_sums() -> None:
    rng = np.random.default_rng(0)
    k_LN = rng.integers(0, 9, (3, 500))
    entropy_LN = k_LN + 10.0 * np.arange(500)  # tells which token and which k it was
    is_vision_N = np.arange(500) % 3 == 0
    sample = TokenSample.of(sums_of(entropy_LN, k_LN, is_vision_N))
    sample.check(3)
    token_N = sample.entropy_LN[0].astype(int) // 10
    np.testing.assert_array_equal(sample.k_LN, k_LN[:, token_N])
    np.testing.assert_array_equal(sample.is_vision_N, is_vision_N[token_N])
    for layer in range(3):
        for k in range(9):
            here_N = k_LN[layer] == k
            assert sample.k_hist_vision_LK[layer, k] == (here_N & is_vision_N).sum()
            assert sample.k_hist_text_LK[layer, k] == (here_N & ~is_vision_N).sum()


def test_the_routing_summary_by_hand() -> None:
    sums = sums_of(
        entropy_LN=np.array([[1.0, 1.5, 2.0], [1.0, 1.0, 0.25]]),
        k_LN=np.array([[0, 1, 2], [3, 3, 3]]),  # the first k experts of 4
        is_vision_N=np.array([True, True, False]),
        experts=4,
    )
    assert routing_summary(sums) == {
        "mean_k": 2.0,
        "mean_k_per_layer": [1.0, 3.0],
        "mean_k_vision": 1.75,
        "mean_k_text": 2.5,
        "entropy_per_layer": [1.5, 0.75],
        "spearman_per_layer": [1.0, None],
        "load_max_over_mean_per_layer": [pytest.approx(2 / 0.75), pytest.approx(4 / 3)],
        "idle_experts_per_layer": [2, 1],
        "num_experts": 4,
        "tokens": 3,
    }
    nothing = sums_of(np.ones((1, 2)), np.zeros((1, 2), int), np.zeros(2, bool))
    assert routing_summary(nothing)["load_max_over_mean_per_layer"] == [None]


def test_a_modality_without_a_token_has_no_mean() -> None:
    summary = routing_summary(sums_of(*ONE_LAYER))
    assert summary["mean_k_vision"] is None
    assert summary["mean_k_text"] == 1.0
    with pytest.raises(ValueError, match="without tokens"):
        routing_summary(RoutingSums.empty(1, 4))
