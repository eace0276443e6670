"""The loss's own suite: checked against the definition, and a table that says what it takes."""

import pytest
import torch

from benchmarks import monotonic
from benchmarks.report import render
from benchmarks.shapes import Shape

SHAPE = Shape("small", 32, 16, 8, 6)


def test_the_table_has_the_loss_beside_the_definition_and_the_layer():
    rows = monotonic.monotonic_rows(SHAPE, 64, torch.float32, torch.device("cpu"), 1)
    assert [row["layer"] for row in rows] == ["monotonic loss", "the same, written out", "gemoe_ds"]
    loss, obvious, layer = rows
    for row in (obvious, layer):  # one round: the share is that of the two times
        assert row["loss_share"] == pytest.approx(loss["ms"] / row["ms"], rel=0.02)
    about = {"device": "cpu", "machine": "m", "threads": 1, "dtype": "float32", "date": "d"}
    page = render(about | {"commit": "c", "seconds": 1, "command": "x", "rows": rows}, "f.png")
    assert "## The monotonic loss" in page and "the whole layer, k 5.1" in page


def test_a_wrong_loss_is_not_timed(monkeypatch):
    right = monotonic.ours
    monkeypatch.setattr(monotonic, "ours", lambda *given: 1.001 * right(*given))
    with pytest.raises(AssertionError):
        monotonic.monotonic_rows(SHAPE, 64, torch.float32, torch.device("cpu"), 1)
