"""The sample log of several ranks is one list in the order of the run."""

from __future__ import annotations

import json

from gemoe_ds.train.sample_log import FOLDER, SampleLog, forget_after, read_sample_log


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
    forget_after(tmp_path, 2)
    assert read_sample_log(tmp_path) == {1: ["11", "10"], 2: ["21", "20"]}


def test_a_run_goes_on_in_the_log_of_the_version_before(tmp_path):
    old = tmp_path / "ledger"
    old.mkdir()
    lines = [json.dumps({"step": s, "micro_batch": s - 1, "ids": [str(s)]}) + "\n" for s in (1, 2)]
    (old / "rank-00000.jsonl").write_text("".join(lines))
    forget_after(tmp_path, 1)
    log = SampleLog(tmp_path, 0)
    log.write(2, 1, ["again"])
    log.close()
    assert read_sample_log(tmp_path) == {1: ["1"], 2: ["again"]} and not old.exists()
    old.mkdir()  # whoever made it: the new one stays
    forget_after(tmp_path, 2)
    assert read_sample_log(tmp_path) == {1: ["1"], 2: ["again"]} and old.exists()
