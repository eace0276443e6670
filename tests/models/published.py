"""Tokenizers of the kind that each model has, made small, and what its own code makes of chats.

golden/chats.json: values that the code named there printed. The ids of special tokens are the
published ones. Runs of an id are [id, times]; -200 is where MoE-LLaVA puts an image's features.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.tokenizer import load_tokenizer

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden/chats.json").read_text(encoding="utf-8")
)
MERGES: list[str] = GOLDEN.pop("merges")
FIRST = 300  # id of the first byte


def write_published(name: str, folder: Path, without: tuple[str, ...] = (), **config: Any) -> Path:
    """The tokenizer folder of a backbone, less some special tokens, with `config` changed."""
    recipe = GOLDEN[name]["tokenizer"]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]
    special = {t: i for t, i in recipe["special"].items() if t not in without}
    added = special | recipe["plain"]
    content = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": added[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": token.isspace(),
                "special": token in special,
            }
            for token in sorted(added, key=added.__getitem__)
        ],
        "normalizer": recipe["normalizer"],
        "pre_tokenizer": recipe["pre_tokenizer"],
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "vocab": {w: FIRST + i for i, w in enumerate(words)} | recipe.get("moved", {}) | added,
            "merges": MERGES,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(recipe["config"] | config))
    return folder


def load(name, folder, image_token=None):
    return load_tokenizer(folder, Backbone.named(name).chat, image_token)
