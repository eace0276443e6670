"""The ledger of several ranks is one list in the order of the run."""

from __future__ import annotations

from gemoe_ds.train.ledger import FOLDER, Ledger, forget_after, read_ledger


def test_ranks_are_put_in_order_and_a_lost_stretch_is_dropped(tmp_path):
    ranks = [Ledger(tmp_path, rank) for rank in range(2)]
    for step in (1, 2, 3):
        for block in (1, 0):  # within a step: a rank that took over from another
            ranks[block].write(step, 2 * step + 1 - block, [f"{step}{block}"])
    for ledger in ranks:
        ledger.close()
    assert read_ledger(tmp_path) == {step: [f"{step}1", f"{step}0"] for step in (1, 2, 3)}
    with (tmp_path / FOLDER / "rank-00000.jsonl").open("a") as file:
        file.write('{"step": 2, "micro')  # cut by a crash
    forget_after(tmp_path, 2)
    assert read_ledger(tmp_path) == {1: ["11", "10"], 2: ["21", "20"]}
