"""The table of docs/engine.md is true: what is equal was measured, what is refused is refused."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields

import pytest

from gemoe_ds.config.deepspeed import check_deepspeed
from gemoe_ds.config.load import config_from_dict
from gemoe_ds.errors import ConfigError
from tests.engine.parity import Case, all_cases, is_equal
from tests.helpers import repository

EXPERTS = {"frozen": "routers", "trainable": "all"}
OFFLOADS = {
    "no": {},
    "cpu": {"offload_optimizer": {"device": "cpu"}},
    "nvme": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}},
    "parameters": {"offload_param": {"device": "cpu"}},
}


def table() -> list[tuple[list[str], str]]:
    """The rows with every list of values written out, and their verdicts."""
    rows = []
    for line in (repository() / "docs/engine.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| ZeRO"):
            *cells, verdict = (cell.strip() for cell in line.strip("|").split("|"))
            options = [[value.strip() for value in cell.split(",")] for cell in cells]
            rows += [(list(values), verdict) for values in itertools.product(*options)]
    return rows


def case_of(values: list[str]) -> Case:
    zero, offload, experts, ep_size, dtype, accumulation, recompute = values
    return Case(
        int(zero),
        offload == "cpu",
        int(ep_size),
        EXPERTS[experts],
        int(accumulation),
        recompute == "on",
        dtype,
        router="gemoe" if dtype == "float32" else "top_k",
    )


def test_equal_rows_are_the_combinations_that_were_measured_and_equal():
    measured = json.loads((repository() / "results/parity.json").read_text(encoding="utf-8"))
    names = [field.name for field in fields(Case)]
    found = {Case(**{n: row[n] for n in names if n in row}): row for row in measured["cases"]}
    promised = {case_of(values) for values, verdict in table() if verdict == "equal"}
    assert promised == set(found) == set(all_cases())
    assert all(row["equal"] and is_equal(case, row["errors"]) for case, row in found.items())
    assert measured["ranks"] == 4


@pytest.mark.parametrize(
    ("values", "verdict"),
    [(values, verdict) for values, verdict in table() if verdict != "equal"][::7],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_refused_rows_are_refused_with_these_words(values, verdict, tmp_path):
    zero, offload, experts, ep_size, dtype, accumulation, recompute = values
    assert verdict.startswith("refused: ")
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": int(zero)} | OFFLOADS[offload]}))
    with pytest.raises(ConfigError) as refusal:
        config = config_from_dict(
            {
                "output_dir": "unused",
                "model": {
                    "backbone": {"name": "tiny"},
                    "checkpoint": "unused",
                    "router": {"name": "gemoe"},
                    "trainable": EXPERTS[experts],
                    "dtype": dtype,
                    "activation_checkpointing": recompute == "on",
                },
                "data": {"train_path": "unused", "tokenizer": "unused"},
                "optim": {"lr": 1e-3},
                "parallel": {"ep_size": int(ep_size)},
                "train": {
                    "steps": 1,
                    "micro_batch_size": 1,
                    "gradient_accumulation_steps": int(accumulation),
                },
                "deepspeed": str(file),
            }
        )
        config.validate_world(4)
        check_deepspeed(config, 4)
    assert verdict.removeprefix("refused: ") in str(refusal.value)
