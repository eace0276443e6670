"""`--base`: the folder before it was quantised, and no other model."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from gemoe_ds.errors import ConfigError
from gemoe_ds.export.other_base import check_other_base
from tests.hf_io.test_quantise_folder import write_quantised
from tests.models.cases import write_case


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and its twin in few bits."""
    root = tmp_path_factory.mktemp("other_base")
    write_case("olmoe", root)
    return root / "base", write_quantised("olmoe", root, "nf4") / "base"


def test_the_folder_before_it_was_quantised_is_taken(folders):
    whole, in_few_bits = folders
    check_other_base(whole, in_few_bits)
    check_other_base(in_few_bits, whole)


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "model.norm.weight"])
def test_another_model_of_the_same_shapes_is_refused(folders, tmp_path, key):
    whole, in_few_bits = folders
    other = shutil.copytree(whole, tmp_path / "other")
    for file in other.glob("*.safetensors"):
        tensors = load_file(file)
        if key in tensors:
            tensors[key] = tensors[key] + 0.5
            save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    with pytest.raises(ConfigError, match=rf"--base=.*other is not the model of .*{key} differs"):
        check_other_base(other, in_few_bits)


def test_another_kind_of_model_and_no_model_are_named(folders, tmp_path):
    whole, in_few_bits = folders
    with pytest.raises(ConfigError, match=r"--base=.*nothing: no config.json there"):
        check_other_base(tmp_path / "nothing", in_few_bits)
    other = shutil.copytree(whole, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_moe"}))
    with pytest.raises(ConfigError, match="is of model_type 'qwen2_moe', .* is of 'olmoe'"):
        check_other_base(other, in_few_bits)
