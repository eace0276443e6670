"""`gemoe export --base`: is another folder the model whose weights a run was trained on?"""

from __future__ import annotations

from pathlib import Path

import torch

from gemoe_ds.errors import ConfigError
from gemoe_ds.hf_io.hf_config import read_config
from gemoe_ds.hf_io.safetensors_reader import open_stored

_ROWS = 64  # of a tensor that are compared


def check_other_base(other: Path, base: Path) -> None:
    """ConfigError if not. What quantising leaves as it is must be the same in both folders:
    embeddings, norms, gates."""
    if not (other / "config.json").is_file():
        raise ConfigError(f"--base={other}: no config.json there; give a Hugging Face folder")
    kinds = [read_config(folder).get("model_type") for folder in (other, base)]
    if kinds[0] != kinds[1]:
        raise ConfigError(
            f"--base={other} is of model_type {kinds[0]!r}, {base} is of {kinds[1]!r}; give the "
            "same model"
        )
    theirs, ours = open_stored(other), open_stored(base)
    for key in sorted(theirs.keys() & ours.keys()):
        one, two = theirs[key], ours[key]
        if one.dtype != two.dtype or not one.shape:
            continue
        rows = slice(0, min(_ROWS, one.shape[0], two.shape[0]))
        if one.shape != two.shape or not torch.equal(one.read(rows), two.read(rows)):
            raise ConfigError(
                f"--base={other} is not the model of {base}: {key} differs; give the folder that "
                "it was quantised from"
            )
