"""The sample log of several ranks is one list in the order of the run."""

from __future__ import annotations

import json
import os

import pytest

from gemoe_ds.train.sample_log import FOLDER, SampleLog, adopt_old_name, forget_after
from tests.train.sample_logs import read_sample_log


def test_ranks_are_put_in_order_and_a_lost_stretch_is_dropped(tmp_path):
    ranks = [SampleLog(tmp_path, rank) for rank in range(2)]
    for step in (1, 2, 3):
        for block in (1, 0):  # within a step: a rank that took over from another
            ranks[block].write(step, 2 * step + 1 - block, [f"{step}{block}"])
    for sample_log in ranks:
        sample_log.close()
    assert read_sample_log(tmp_path) == {step: [f"{step}1", f"{step}0"] for step in (1, 2, 3)}
    with (tmp_path / FOLDER / "rank-00000.jsonl").open("a") as file:
        file.write('{"step": 2, "micro')  # cut by a crash
    files = [tmp_path / FOLDER / f"rank-0000{rank}.jsonl" for rank in range(2)]
    before = [file.read_text() for file in files]
    forget_after(tmp_path, 2, (1, 2))
    assert files[0].read_text() == before[0] and len(files[1].read_text()) < len(before[1])
    written = files[1].stat().st_ino
    for rank in range(3):  # of another number of ranks
        forget_after(tmp_path, 2, (rank, 3))
    assert read_sample_log(tmp_path) == {1: ["11", "10"], 2: ["21", "20"]}
    assert files[1].stat().st_ino == written, "what has nothing to forget stays as it is"


def test_killed_while_it_forgets_a_file_is_as_before_or_after(tmp_path, monkeypatch):
    log = SampleLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, step, [str(step)])
    log.close()
    whole = read_sample_log(tmp_path)

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, name, dies)
            forget_after(tmp_path, 2)
        assert read_sample_log(tmp_path) == whole


def test_a_run_goes_on_in_the_log_of_the_version_before(tmp_path):
    old = tmp_path / "ledger"
    old.mkdir()
    lines = [json.dumps({"step": s, "micro_batch": s - 1, "ids": [str(s)]}) + "\n" for s in (1, 2)]
    (old / "rank-00000.jsonl").write_text("".join(lines))
    adopt_old_name(tmp_path)
    forget_after(tmp_path, 1)
    log = SampleLog(tmp_path, 0)
    log.write(2, 1, ["again"])
    log.close()
    assert read_sample_log(tmp_path) == {1: ["1"], 2: ["again"]} and not old.exists()
    old.mkdir()  # whoever made it: the new one stays
    adopt_old_name(tmp_path)
    assert read_sample_log(tmp_path) == {1: ["1"], 2: ["again"]} and old.exists()
