"""Figures that follow from sums, and files that are whole or refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gemoe_ds.analysis.record import spearman
from gemoe_ds.analysis.routing_sums import NUM_BINS, RoutingSums, entropy_bins
from gemoe_ds.errors import DataError
from tests.analysis.evaluations import same_sums, sums_of, tokens


@pytest.mark.parametrize("experts", [8, 64, 128])
@pytest.mark.parametrize(
    "middle, spread",
    [(0.5, 0.1), (0.5, 0.005), (0.2, 0.005), (0.97, 0.02), (0.999, 0.001), (0, 0.002)],
)
def test_binned_rank_correlation_is_near_the_exact_one(experts, middle, spread):
    """Of the largest entropy, log2 E: everywhere, and crowded at the ends. Ties and k = 0 too."""
    rng = np.random.default_rng(0)
    entropy_N = middle + spread * rng.standard_normal(20_000)
    entropy_N = (np.clip(entropy_N, 0, 1) * np.log2(experts)).astype(np.float32)
    noise_N = rng.standard_normal(20_000)
    for growth in (3.0, -0.5, 0.0):
        wanted_N = growth * (entropy_N - entropy_N.mean()) / entropy_N.std() + 3 + noise_N
        k_N = np.clip(np.rint(wanted_N), 0, 8).astype(int)
        sums = sums_of(entropy_N[None], k_N[None], np.zeros(20_000, bool), experts)
        assert sums.spearman_L[0] == pytest.approx(spearman(entropy_N, k_N), abs=0.002)


def test_rank_correlation_of_what_shares_no_bin_is_exact():
    rng = np.random.default_rng(0)
    entropy_LN = rng.integers(0, 13, (2, 500)) / 4  # in the middles of bins, with many ties
    k_LN = rng.integers(0, 5, (2, 500))
    k_LN[1] = 3
    sums = sums_of(entropy_LN, k_LN, np.zeros(500, bool), 8)
    assert sums.spearman_L == [pytest.approx(spearman(entropy_LN[0], k_LN[0]), abs=1e-12), None]


def test_bins_keep_the_order_of_any_entropies():
    rng = np.random.default_rng(0)
    wild = np.concatenate(
        [rng.standard_normal(10_000) * 40, rng.random(10_000) * 6, [0, -1e30, 1e30]]
    )
    bins = entropy_bins(np.sort(wild), 64)
    assert (np.diff(bins) >= 0).all() and (bins[0], bins[-1]) == (0, NUM_BINS - 1)
    assert len(np.unique(entropy_bins(np.linspace(0, 6, 50_000), 64))) > 2000
    assert entropy_bins(np.zeros(3), 1).shape == (3,)  # one expert


def test_numbers_of_no_token_are_none_or_nan():
    sums = RoutingSums.empty(3, 4)
    sums.check()
    assert np.isnan(sums.mean_k_ML).all() and np.isnan(sums.mean_k_L).all()
    assert sums.spearman_L == sums.load_max_over_mean_L == [None] * 3
    assert sums.idle_experts_L == [4] * 3 and sums.mean_entropy_D.shape == (0,)
    same_sums(sums + sums, sums)


def test_a_file_gives_back_every_number(tmp_path):
    sums = sums_of(**tokens(None, num_tokens=500), experts=64)
    sums.save(tmp_path / "routing.npz")
    same_sums(RoutingSums.load(tmp_path / "routing.npz"), sums)
    assert [path.name for path in tmp_path.iterdir()] == ["routing.npz"]


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("tokens_M", lambda a: a + 1, "count different tokens"),
        ("load_MLE", lambda a: a[:, :1], "k_hist_MLK is"),
        ("load_MLE", lambda a: a * 2, "count different experts"),
        ("k_hist_MLK", lambda a: a - 1, "below 0"),
        ("joint_LBK", lambda a: a[:, 1:], "joint_LBK is"),
        ("entropy_LN", lambda a: a * np.nan, "not finite"),
        ("k_LN", lambda a: a.astype(float), "k_LN is float64"),
        ("hash_N", lambda a: a[::-1], "not in order"),
        ("kind_N", lambda a: a + 3, "what no token is"),
        ("limit", lambda a: a * 0, "a sample of"),
        ("written_tokens_D", lambda a: a + 1, "documents of"),
        ("doc_id_D", lambda a: a[:0], "prompt_tokens_D is"),
    ],
)
def test_a_file_that_does_not_hold_together_is_named(tmp_path, name, change, says):
    sums = sums_of(**tokens(None, num_tokens=300), experts=64)
    path = tmp_path / "routing.npz"
    np.savez(path, **vars(replace(sums, **{name: change(getattr(sums, name))})))
    with pytest.raises(DataError, match=f"{path} is damaged .*{says}.*: answer again"):
        RoutingSums.load(path, "answer again")


def test_a_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "routing.npz"
    with pytest.raises(DataError, match="is missing: run the evaluation again"):
        RoutingSums.load(path)
    for content in (b"", b"PK\x03\x04 cut", b"text"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged"):
            RoutingSums.load(path)
    np.savez(path, tokens_M=np.zeros(3))
    with pytest.raises(DataError, match="is damaged"):
        RoutingSums.load(path)


def test_sums_of_other_models_are_not_added():
    with pytest.raises(ValueError, match="cannot be added"):
        RoutingSums.empty(2, 4) + RoutingSums.empty(2, 8)
