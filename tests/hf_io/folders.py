"""Folders of checkpoints laid out as users have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from gemoe_ds.hf_io.safetensors_reader import INDEX, open_stored


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: stored.read() for key, stored in open_stored(folder).items()}


def as_links(base: Path, root: Path) -> Path:
    """As the Hub's cache has it: links to files of other names that nobody may write to."""
    snapshot = root / "snapshots" / "abc"
    (root / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(base.iterdir())):
        blob = root / "blobs" / str(number)
        shutil.copyfile(path, blob)
        blob.chmod(0o444)
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def below(base: Path, root: Path) -> Path:
    """Shards in a folder, under names of their own."""
    shutil.copytree(base, root)
    index = json.loads((root / INDEX).read_text())
    (root / "w").mkdir()
    for name in set(index["weight_map"].values()):
        (root / name).rename(root / "w" / f"part-{name}")
    index["weight_map"] = {key: f"w/part-{file}" for key, file in index["weight_map"].items()}
    (root / INDEX).write_text(json.dumps(index))
    return root


def with_config(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder
