"""What is said of a run's samples before it begins, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemoe_ds.data.bad_samples import REFUSED
from gemoe_ds.data.sample import Turn, open_samples, write_samples
from gemoe_ds.errors import ConfigError, DataError
from gemoe_ds.train.assemble import meta_collator
from gemoe_ds.train.checks.samples import check_samples
from tests.data.turns import with_turns
from tests.train.resuming import make_config, write_setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Twelve of twenty samples are too long, the longest by much."""
    setting = write_setting(tmp_path_factory.mktemp("look"))
    good, data = open_samples(setting["data"]), setting["root"] / "harmed"
    samples = [good[row] for row in range(len(good))]
    for row in range(12):
        samples[row] = with_turns(samples[row], Turn("a " * (60 + row), "b"))
    write_samples(iter(samples), data, source="test")
    return setting | {"data": data}


def look(setting, output, **changes):
    config = make_config(setting, output, data__max_length=60, **changes)
    samples = open_samples(config.data.train_path)
    return check_samples(config, samples, meta_collator(config), may_write=True)


def test_a_refused_run_leaves_the_whole_list(setting, tmp_path, capsys):
    with pytest.raises(DataError, match=r"^12 samples .*=0.5 \(10 of 20\).*; and 9 more; the list"):
        look(setting, tmp_path, data__max_bad_samples=0.5)
    listed = [json.loads(line) for line in (tmp_path / REFUSED).read_text().splitlines()]
    longest = max(entry["needs"] for entry in listed)
    assert [entry["row"] for entry in listed] == [*range(12)] and longest > 71
    said = capsys.readouterr().out
    assert f"data.max_length=60: 12 (the longest has {longest}); that cannot be read: 0;" in said
    assert said.count("left out: sample s") == 10 and "left out: 2 more" in said
    log = look(setting, tmp_path, data__max_bad_samples=12).bad_samples
    assert len(log) == 12


def test_lengths_beyond_the_model_s_context_are_refused(setting, tmp_path):
    config = make_config(setting, tmp_path, data__max_length=2048)
    assert meta_collator(config).max_length == 2048
    config = make_config(setting, tmp_path, data__max_length=2049)
    with pytest.raises(ConfigError, match="=2049: the model knows positions up to 2048; set data"):
        meta_collator(config)


@pytest.mark.parametrize("budget", [True, "1%", 1.5, -1, None, float("nan"), float("inf")])
def test_a_budget_is_a_whole_number_or_a_share(budget, setting, tmp_path):
    with pytest.raises(ConfigError, match=r"^data.max_bad_samples.*(number|share|equal to 0)"):
        make_config(setting, tmp_path, data__max_bad_samples=budget)


def test_what_is_too_long_is_dropped_or_stops_the_run(setting, tmp_path, capsys):
    lengths, log, chosen, _ = look(
        setting, tmp_path, data__too_long="drop", data__max_bad_samples=0
    )
    said = capsys.readouterr().out
    dropped = int((lengths.whole_N > 60).sum())
    assert dropped >= 12 and len(log) == 0, "dropped by choice, so not bad"
    assert f"dropped: {dropped} samples of more than data.max_length=60 tokens" in said
    assert chosen.row_M.tolist() == np.flatnonzero(lengths.whole_N <= 60).tolist()
    assert chosen.length_M is None
    chosen = look(setting, tmp_path, data__too_long="drop", data__group_by_length=True).selection
    assert chosen.length_M.tolist() == lengths.whole_N[chosen.row_M].tolist()
    assert look(setting, tmp_path, data__max_bad_samples=12).selection.row_M is None
    words = rf"^{dropped} samples have more than data.max_length=60 tokens \(sample s\d+ has .*stop"
    with pytest.raises(DataError, match=words):
        look(setting, tmp_path, data__too_long="stop", data__max_bad_samples=12)
    with pytest.raises(DataError, match="of 20 samples do not fill train.micro_batch_size=9"):
        look(setting, tmp_path, data__too_long="drop", train__micro_batch_size=9)


def test_padding_is_told_and_what_would_leave_little_of_it(setting, tmp_path, capsys):
    def padding(**changes) -> str:
        look(setting, tmp_path, data__max_bad_samples=12, train__micro_batch_size=4, **changes)
        return next(line for line in capsys.readouterr().out.splitlines() if "padding: " in line)

    shuffled, grouped = padding(), padding(data__group_by_length=True)
    assert shuffled.endswith("; data.group_by_length=true leaves little of it")
    assert grouped.endswith("micro-batches of 4")
    share = [int(line.split()[1].rstrip("%")) for line in (shuffled, grouped)]
    assert share[1] < 0.7 * share[0], "20 samples, 12 of them bad"
