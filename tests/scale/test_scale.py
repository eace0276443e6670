"""What `make scale` measures, on few ranks; the fits, and the page."""

from __future__ import annotations

import pytest

from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.random_checkpoint import write_headers
from tests.helpers import run_ranks
from tests.scale import reading
from tests.scale.__main__ import exponent
from tests.scale.page import page
from tests.scale.whole_runs import measured, train_and_resume
from tests.train.resuming import write_setting


def test_collectives_do_not_depend_on_the_number_of_ranks(tmp_path):
    calls = []
    for ranks in (2, 8):
        root = tmp_path / f"{ranks}"  # of its own: lengths of samples are kept beside them
        options = {"output": root / "run", "global_batch_size": ranks, "zero": 0, "steps": 2}
        found = run_ranks(measured, ranks, write_setting(root), options)
        assert all(rank["calls"] == found[0]["calls"] for rank in found)
        assert max(rank["sockets"] for rank in found) == found[0]["sockets"]
        calls.append(found[0]["calls"])
    assert calls[0] == calls[1]
    assert calls[0]["step"]["all_to_all_single"] > 0


def test_every_byte_of_a_folder_is_read_once_by_all_hosts(tmp_path):
    write_headers(Backbone.named("olmoe"), tmp_path, shards=5)
    assert reading.row("olmoe", tmp_path, 3)["read"] == 1


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_ranks(tmp_path):
    rows = train_and_resume(write_setting(tmp_path), tmp_path / "run", 12, 4, zero=2)
    assert [row["ranks"] for row in rows] == [12, 4]
    assert "| 12 | 2 |" in page({"runs": {"rows": rows, **dict.fromkeys(_ORIGIN, "")}})


_ORIGIN = ("command", "commit", "machine", "date")


def test_an_exponent_is_the_slope():
    assert exponent({n: 3 * n**0.7 for n in (8, 64, 4096)}) == 0.7
    assert exponent({8: 2.0, 64: 2.0}) == 0
