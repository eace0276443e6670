"""A small OLMoE in one file."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save_file

from tests.models.cases import write_case


@pytest.fixture
def one_file(tmp_path):
    """OLMoE in one file, without an index."""
    base, _ = write_case("olmoe", tmp_path)
    tensors = {}
    for file in base.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (base / "model.safetensors.index.json").unlink()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base
