"""`parallel.ep_size: auto`, `deepspeed: auto`, and the ways that `--estimate` shows."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from gemoe_ds.cli.train import main
from gemoe_ds.config.deepspeed import check_deepspeed
from gemoe_ds.config.load import config_from_dict
from gemoe_ds.errors import ConfigError
from gemoe_ds.models.cost.layer_time import Layer
from gemoe_ds.train import layout, run
from gemoe_ds.train.layout import Row
from tests.helpers import run_ranks
from tests.models.cases import write_case, write_text
from tests.train.resuming import make_config, one_group, write_setting

GIB = 2**30


def trained(setting: dict, free: int, held: int) -> tuple[int, str]:
    """The number of ranks that the run's recipe has, where so much memory is free, and a process
    holds so much already."""
    layout.free_for_a_rank, layout.resident_memory = (lambda *_: free), (lambda: held)
    output = setting["root"] / f"run {free} {held}"
    config = make_config(
        setting, output, parallel__ep_size="auto", train__steps=2, deepspeed="auto"
    )
    run.train(config)
    recipe = yaml.safe_load((output / "config.yaml").read_text())
    return recipe["parallel"]["ep_size"], recipe["deepspeed"]


def trained_on(rank: int, setting: dict, machines: list[tuple[int, int]]) -> list[tuple[int, str]]:
    with one_group(run):
        return [trained(setting, *machine) for machine in machines]


def test_as_few_ranks_share_experts_as_fit(tmp_path):
    """Of two; where none fit the preflight, which knows what is free, has the word."""
    expected = {(100 * GIB, 0): 1, (1, 0): 2, (1, 100 * GIB): 1}
    for found in run_ranks(trained_on, 2, write_setting(tmp_path), list(expected)):
        assert found == [(ep_size, "auto") for ep_size in expected.values()]


def config_of(**changes):
    tree = {
        "output_dir": "out",
        "model": {"backbone": {"name": "tiny"}, "router": {"name": "gemoe"}, "checkpoint": "x"},
        "data": {"train_path": "x", "tokenizer": "x"},
        "optim": {"lr": 1e-3},
        "train": {"steps": 1, "micro_batch_size": 1},
        "deepspeed": "auto",
    }
    tree["model"] |= changes
    return config_from_dict(tree)


@pytest.mark.parametrize("value", ["many", 0, 2.5, None, True])
def test_what_no_number_of_ranks_is(value):
    with pytest.raises(ConfigError, match="parallel.ep_size: .* whole number from 1 on, or 'auto'"):
        make_config(dict.fromkeys(("hf", "data", "tokenizer"), "x"), "out", parallel__ep_size=value)


def test_deepspeed_auto_says_what_it_takes():
    for trainable, stage, reason in (("routers", 0, "small"), ("experts", 2, "divided")):
        config = config_of(trainable=trainable)
        (line,) = check_deepspeed(config, 8)
        assert config.zero_stage == stage and reason in line and f"ZeRO {stage}" in line


def test_zero_3_on_many_ranks_is_warned_of():
    config = config_of().with_deepspeed("zero3")
    assert config.zero_stage == 3 and check_deepspeed(config, 8) == []
    (line,) = check_deepspeed(config, 512)
    assert line.startswith("slow: ") and "512 ranks" in line and "deepspeed=zero0" in line


def recipe_of(tmp_path, ep_size):
    base, tokenizer = write_case("olmoe", tmp_path)
    write_text(tmp_path / "data")
    tree = {
        "output_dir": str(tmp_path / "out"),
        "model": {
            "backbone": {"name": "olmoe"},
            "router": {"name": "gemoe", "k_high": 3},
            "checkpoint": str(base),
        },
        "data": {"train_path": str(tmp_path / "data"), "tokenizer": str(tokenizer)},
        "optim": {"lr": 1e-3},
        "train": {"steps": 1, "micro_batch_size": 1},
        "parallel": {"ep_size": ep_size},
        "deepspeed": "auto",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.mark.parametrize(
    "ep_size, gib, taken, said",
    [
        ("auto", 80, 1, "parallel.ep_size=auto takes 1, the smallest that fits"),
        ("auto", 0.001, 8, "parallel.ep_size=auto: none inside a host fits"),
        (4, 80, 4, "parallel.ep_size=auto takes 1"),
    ],
)
def test_estimate_shows_every_way(tmp_path, capsys, ep_size, gib, taken, said):
    main([recipe_of(tmp_path, ep_size), "--estimate", "16", "--gpu-memory", str(gib)])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line[:9].strip().isdigit()]
    assert [(row[0], row[1]) for row in rows] == [
        (str(n), stage) for n in (1, 2, 4, 8) for stage in ("zero0", "zero2", "zero3")
    ]
    (row,) = (row for row in rows if row[-1] == "taken")
    assert row[:2] == [str(taken), "zero0"] and said in out
    said_of = re.search(r"one rank: (\S+) GiB[^$]*context (\S+), NCCL's buffers (\S+)\n", out)
    parts = map(float, said_of.groups())
    assert float(row[2]) == pytest.approx(sum(parts), abs=0.02), "each is counted once"
    assert all(float(row[4]) == 0 for row in rows if row[0] == "1"), "nothing to exchange"


def test_what_fits_over_several_hosts_alone_is_not_what_auto_takes():
    rows = [Row(n, "zero2", 160 // n, 0, 0, 0) for n in (4, 8, 16)]
    config = config_of(trainable="experts").with_ep_size("auto")
    taken = layout._taken(config, rows, free=10)
    *_, said = layout._table(rows, taken, 10, 16, 100)
    assert taken.ep_size == 8 and "none inside a host fits" in said
    *_, said = layout._table(rows, layout._taken(config, rows, free=20), 20, 16, 100)
    assert "auto takes 8, the smallest that fits" in said


def test_more_ranks_than_are_listed_may_share_the_experts(tmp_path, capsys):
    recipe = recipe_of(tmp_path, 128)
    asked = ["--estimate", "128", "--gpu-memory", "80"]
    with pytest.raises(SystemExit):
        main([recipe, *asked])
    assert "does not divide the backbone's 8 experts" in capsys.readouterr().err
    (base,) = tmp_path.rglob("config.json")
    base.write_text(json.dumps(json.loads(base.read_text()) | {"num_experts": 128}))
    main([recipe, *asked])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "  zero0  " in line]
    assert [row[0] for row in rows] == [str(2**n) for n in range(8)]
    assert [row[0] for row in rows if row[-1] == "taken"] == ["128"]


def test_a_micro_batch_of_packed_rows_has_their_tokens(tmp_path, capsys):
    main([recipe_of(tmp_path, 1), "data.pack=true", "data.max_length=64", "--estimate", "1"])
    out = capsys.readouterr().out
    share = float(re.search(r"rows of 64 tokens, ([\d.]+)% of them valid", out)[1])
    tokens = int(re.search(r"a micro-batch of ([\d,]+) tokens", out)[1])
    assert share > 50 and tokens == pytest.approx(64 * share / 100, abs=1)


def test_bytes_of_an_exchange():
    """Two ranks: of a token's one expert half are elsewhere; its row goes there and back."""
    layer = Layer(d_model=10, width=4, num_experts=8)
    assert layer.bytes(100, 1, 2) == pytest.approx(2 * 50 * 10 * 2 + 8 * 100 / 2)
