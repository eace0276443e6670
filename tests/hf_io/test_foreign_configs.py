"""What a config.json says of a model: as stock transformers computes it, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import OlmoeForCausalLM

from gemoe_ds.errors import CheckpointError
from tests.hf_io.test_foreign_folders import with_config
from tests.models import reference
from tests.models.cases import CASES, write_case
from tests.models.small import make_model
from tests.models.test_olmoe import logits_of, write_olmoe

THETA = {"rope_theta": 500000.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
SAID = {
    "theta, old": THETA,
    "theta, new": {"rope_parameters": {"rope_type": "default", **THETA}},
    "both, at odds": {"rope_parameters": {"rope_type": "default", **THETA}, "rope_theta": 1e4},
    "linear, old": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "linear, new": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **THETA}},
    "yarn, old": {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", **YARN}},
    "yarn, new": {"rope_parameters": {"rope_type": "yarn", **YARN, **THETA}},
    "clipped": {"clip_qkv": 0.5},
    "swish": {"hidden_act": "swish"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Without a word on positions; and its logits."""
    folder = write_olmoe(tmp_path_factory.mktemp("configs") / "base")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder, config


IDS = torch.arange(3, 11).repeat(1, 5)


@pytest.mark.parametrize("said", SAID)
def test_logits_are_those_of_stock_transformers(said, plain):
    folder, config = plain
    (folder / "config.json").write_text(json.dumps(config | SAID[said]))
    stock = OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        reference.assert_same(logits_of(make_model("olmoe", folder), IDS), stock(IDS).logits)


@pytest.mark.parametrize("name", CASES)
def test_experts_of_another_activation_are_refused(name, tmp_path):
    """They would be computed with SiLU, and the export with its own."""
    folder, _ = write_case(name, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    section = next((key for key in ("text_config", "language_config") if key in config), "")
    key = "activation_type" if name == "molmoe" else "hidden_act"
    changes = {section: config[section] | {key: "gelu"}} if section else {key: "gelu"}
    where = f"{section}.{key}" if section else key
    with pytest.raises(CheckpointError, match=f"{where}='?gelu") as error:
        make_model(name, with_config(folder, **changes))
    assert "\n" not in str(error.value)
