"""What a config.json says of a model: as stock transformers computes it, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import OlmoeForCausalLM

from gemoe_ds.errors import CheckpointError
from tests.hf_io.folders import with_config
from tests.hf_io.one_file import make
from tests.models import reference
from tests.models.cases import CASES, write_case
from tests.models.olmoe.small import logits_of, write_olmoe
from tests.models.small import make_model

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


@pytest.mark.parametrize("text", ["[]", "null", '"olmoe"', "{", "[" * 200_000])
@pytest.mark.parametrize("name", [*CASES, "upcycled"])
def test_a_config_that_is_none(name, text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        make(name, tmp_path)


HEADS = ["num_attention_heads", "num_key_value_heads", "n_heads"]


EXPERTS = ["num_experts", "moe_num_experts", "n_routed_experts"]


TOP = ["num_experts_per_tok", "moe_top_k", "top_k_experts"]


LAYERS = ["num_hidden_layers", "n_layers"]


WIDTH = ["hidden_size", "d_model"]


def put(config, keys, value):
    for key, old in config.items():
        if isinstance(old, dict) and key != "vision_config":
            put(old, keys, value)
        elif key in keys:
            config[key] = [value] * len(old) if isinstance(old, list) else value


@pytest.mark.parametrize(
    "keys, value, words",
    [
        (HEADS, 0, r"heads=0, a whole number"),
        (HEADS, "2", r"heads='2', a whole number"),
        (EXPERTS, -1, r"experts=\[?-1"),
        (EXPERTS, "8", r"experts=\[?'8'"),
        (TOP, 0, r"=0, a whole number from 1 on"),
        (TOP, 99, r"99 experts a token, of \d; it must be from 1 to \d"),
        (LAYERS, 1, r"unexpected: |there are 1 layers"),
        (LAYERS, 2.0, r"config.json"),
        (WIDTH, None, r"config.json"),
        (HEADS, 5, r"heads|has shape"),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_a_config_of_no_possible_model(name, keys, value, words, tmp_path):
    base, _ = write_case(name, tmp_path)
    path = base / "config.json"
    config = json.loads(path.read_text())
    put(config, keys, value)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        make(name, base)
