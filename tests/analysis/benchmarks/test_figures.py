"""The figures show what the files hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from gemoe_ds.analysis import drawing
from gemoe_ds.analysis.benchmarks import expert_figures
from gemoe_ds.analysis.benchmarks.collect import ModeRun, read_modes
from gemoe_ds.analysis.benchmarks.columns import COLUMNS
from gemoe_ds.analysis.benchmarks.figures import document_entropy, draw_all, some_layers
from gemoe_ds.analysis.benchmarks.groups import Model, models_of
from gemoe_ds.analysis.routing_sums import IMAGE
from tests.analysis.benchmarks.folders import (
    EXPERTS,
    LAYERS,
    demo_run,
    mode_of,
    routing_of,
    sums_of,
    write_mode,
)

TASKS = {"scienceqa_img": 40, "gqa": 30, "mmlu_virology": 20, "mmlu_anatomy": 30}
GATES = {
    name: np.random.default_rng(seed).standard_normal((LAYERS, EXPERTS, 5)).astype(np.float32)
    for seed, name in enumerate(("before", "after"))
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    (found,) = models_of(read_modes([demo_run(tmp_path_factory.mktemp("run"), TASKS)]))
    return found


@pytest.fixture(scope="module")
def drawn(model: Model) -> dict[str, Figure]:
    return {name: figure for name, _, figure in draw_all([model], GATES)}


def panel(figure: Figure, title: str) -> Axes:
    (found,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title
                or axes.get_title() == title]  # fmt: skip
    return found


def test_there_is_a_figure_for_each_of_the_papers(drawn: dict[str, Figure]) -> None:
    assert set(drawn) == {
        "mean_k_per_layer_table_1",
        "mean_k_per_layer_table_9",
        "entropy_against_k_gemoe_table_1",
        "entropy_against_k_gemoe_table_9",
        "gain_of_more_experts",
        "tokens_per_expert",
        "load_by_modality_gemoe",
        "routing_paths_gemoe",
        "expert_similarity",
    }


def test_mean_k_of_layers_is_over_seeds(model: Model, drawn: dict[str, Figure]) -> None:
    axes = panel(drawn["mean_k_per_layer_table_9"], "MMLU")
    own, gemoe = axes.lines
    assert list(own.get_ydata()) == [4, 4] and gemoe.get_label() == "GeMoE"
    runs = [run for run in model.runs if run.mode.method == "gemoe"]
    mean_L = np.mean([run.routing["MMLU"].mean_k_L for run in runs], axis=0)
    assert len(runs) == 2 and gemoe.get_ydata() == pytest.approx(mean_L)
    assert to_hex(gemoe.get_color()) == drawing.COLOURS["gemoe"].lower()


def test_entropy_and_k_are_those_of_the_sample(model: Model, drawn: dict[str, Figure]) -> None:
    figure = drawn["entropy_against_k_gemoe_table_1"]
    axes = panel(figure, "GQA, layer 2")
    sums = model.groups[-1].first.routing["GQA"]
    (text,) = axes.texts
    assert text.get_text() == f"Spearman {sums.spearman_L[1]:.3f}"
    assert axes.collections[0].get_array().sum() == sums.k_LN.shape[1]  # every token in a cell
    assert len(figure.axes) == 2 * LAYERS


def test_gains_join_two_k_by_document(model: Model, drawn: dict[str, Figure]) -> None:
    axes = panel(drawn["gain_of_more_experts"], "SQA-I")
    curve = axes.lines[0]
    assert curve.get_label() == "2 to 4 experts"
    more, fewer = (group.first.tasks["scienceqa_img"] for group in model.groups[:2])
    sums = sums_of(more)
    entropy_D = dict(zip(sums.doc_id_D.tolist(), sums.mean_entropy_D.tolist(), strict=True))
    order = sorted(more.documents.doc_id_N.tolist(), key=entropy_D.__getitem__)
    change = 100 * (more.documents.right_N - fewer.documents.right_N)
    parts = np.array_split(order, 8)
    assert curve.get_xdata() == pytest.approx([np.mean([entropy_D[d] for d in p]) for p in parts])
    assert curve.get_ydata() == pytest.approx([change[part].mean() for part in parts])


def test_a_document_without_tokens_is_in_no_gain(tmp_path: Path) -> None:
    folder = write_mode(tmp_path, "k_4", mode_of("top_k", 4), {"gsm8k": np.ones(6)})
    sums = routing_of(6, 4)
    sums.doc_id_D = sums.doc_id_D + 1  # so 0 is not there, and 6 is nobody's
    sums.save(folder / "gsm8k/routing.npz")
    (run,) = read_modes([folder])
    (column,) = [column for column in COLUMNS if column.heading == "GSM-8K"]
    entropy_D = document_entropy(run, column)
    assert np.isnan(entropy_D[0]) and entropy_D[1:] == pytest.approx(sums.mean_entropy_D[:5])


def test_loads_are_shares(model: Model, drawn: dict[str, Figure]) -> None:
    run = model.groups[-1].first
    shares = [100 * sums.load_LE / sums.num_tokens for sums in run.routing.values()]
    image = panel(drawn["tokens_per_expert"], "GeMoE").images[0]
    assert np.asarray(image.get_array()) == pytest.approx(np.mean(shares, axis=0))
    bars = panel(drawn["load_by_modality_gemoe"], "Layer 3").containers
    load_E = sum(sums.load_MLE[IMAGE, 2] for sums in run.routing.values())
    assert [bar.get_height() for bar in bars[0]] == pytest.approx(100 * load_E / load_E.sum())
    assert sum(bar.get_height() for bar in bars[1]) == pytest.approx(100)


def test_paths_are_the_most_frequent_steps(model: Model, drawn: dict[str, Figure]) -> None:
    axes = panel(drawn["routing_paths_gemoe"], "GQA")
    sums = model.groups[-1].first.routing["GQA"]
    seen = [(int(line.get_xdata()[0]) - 1, *map(int, line.get_ydata())) for line in axes.lines]
    for layer, count_EE in enumerate(sums.transitions_LEE):
        counts = sorted(count_EE[a, b] for at, a, b in seen if at == layer)
        assert counts == sorted(count_EE.ravel())[-6:]


def test_similarity_is_the_cosine_and_zero_is_like_nothing(drawn: dict[str, Figure]) -> None:
    gate_ED = GATES["after"][1]
    cosine = panel(drawn["expert_similarity"], "after, layer 2").images[0].get_array()
    for a in range(EXPERTS):
        for b in range(EXPERTS):
            x_D, y_D = gate_ED[a], gate_ED[b]
            exact = x_D @ y_D / np.sqrt((x_D @ x_D) * (y_D @ y_D))
            assert cosine[a, b] == pytest.approx(exact, abs=1e-6)
    dead_ED = np.array([[0, 0], [3, 4]], np.float32)
    assert expert_figures.similarity(dead_ED).tolist() == [[0, 0], [0, pytest.approx(1)]]


def test_without_an_adaptive_method_only_loads_and_gains_are_left(tmp_path: Path) -> None:
    right = {"gsm8k": np.ones(9)}
    for k in (4, 2):
        write_mode(tmp_path, f"k_{k}", mode_of("top_k", k), right)
    (model,) = models_of(read_modes([tmp_path]))
    names = [name for name, _, _ in draw_all([model], {})]
    assert sorted(names) == ["gain_of_more_experts", "tokens_per_expert"]


@pytest.mark.parametrize("number, expected", [(16, [3, 7, 11, 15]), (1, [0]), (3, [0, 1, 2])])
def test_some_layers_are_the_papers(tmp_path: Path, number: int, expected: list[int]) -> None:
    mode = mode_of("gemoe", parameters_per_expert=(1,) * number)
    assert some_layers(ModeRun(mode, tmp_path, {})) == expected
