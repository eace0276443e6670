"""The list of bad samples: one for all ranks, with one budget, known to a run that goes on."""

from __future__ import annotations

import json

import pytest

from gemoe_ds.data.bad_samples import FILE, BadSample, BadSampleLog, alone, listed
from gemoe_ds.errors import DataError


def bad(*rows, needs=None):
    return [BadSample(row, f"s{row}", f"sample s{row}: broken", needs) for row in rows]


def test_what_two_ranks_meet_counts_once():
    """Here the second rank has met 3 and 7."""
    log = BadSampleLog(10, 100, lambda here: [here, bad(3, 7)])
    assert [b.row for b in log.record(bad(5, 3))] == [3, 5, 7]
    assert log.unknown(bad(7, 8)) == bad(8) and len(log) == 3


@pytest.mark.parametrize(
    "budget, limit, said",
    [
        (0, 0, "=0;"),
        (1, 1, "=1;"),
        (2, 2, "=2;"),
        (0.05, 2, r"=0.05 \(2 of 50\);"),
        (0.019, 0, r"=0.019 \(0 of 50\);"),
        (0.58, 29, r"=0.58 \(29 of 50\);"),  # 28.999999999999996
    ],
)
def test_the_budget_is_a_number_or_a_share(budget, limit, said):
    log = BadSampleLog(budget, 50, alone)
    log.record(bad(*range(limit)))
    log.check()
    log.record(bad(40))
    with pytest.raises(DataError, match=f"^{limit + 1} samples? cannot be used, more.*{said}"):
        log.check()


def test_a_run_needs_one_sample_whatever_the_budget():
    log = BadSampleLog(100, 4, alone)
    log.record(bad(*range(4)))
    with pytest.raises(DataError, match="none of 4 samples can be used: .*; and 1 more"):
        log.check()


def test_a_run_that_goes_on_knows_the_list(tmp_path):
    """But for what lies behind its checkpoint, and what was too long, which may fit now."""
    log = BadSampleLog(10, 100, alone)
    log.record(bad(1, needs=300))
    log.record(bad(60))  # at the start, which looks again
    log.keep_in(tmp_path, 0)
    for step in (2, 3, 4):
        log.record(bad(10 * step), step)
    (tmp_path / FILE).open("a").write('{"step": 3, "row"')
    again = BadSampleLog(10, 100, alone)
    again.record(bad(20, 2))
    again.keep_in(tmp_path, 3)
    assert again.samples == bad(2, 20, 30)
    again.record(bad(20, 50), 4)
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [(line["step"], line["row"]) for line in lines] == [(0, 20), (3, 30), (0, 2), (4, 50)]


def test_a_long_list_is_told_in_part():
    lines = listed(bad(*range(25)))
    assert len(lines) == 11 and lines[-1] == "left out: 15 more"
