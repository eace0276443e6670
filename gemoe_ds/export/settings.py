"""What config.json of an exported folder says about prompts, and how the folder is found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download

from gemoe_ds.export.hub import where
from gemoe_ds.models.chat import ChatTemplate

NOT_SAVED = (
    "its files are written by `gemoe export` only, under the names of the base; copy the exported "
    "folder, or train on with it as model.checkpoint; a Trainer of transformers takes "
    "save_strategy='no', and torch.save(model.state_dict(), FILE) keeps what it learned"
)


@dataclass(frozen=True)
class PromptSettings:
    """`config.json`, `gemoe.prompts`: how training wrote a conversation."""

    chat: ChatTemplate
    image_token: tuple[str, int] | None  # that features go to, and its id
    image_mark: str  # stands for a picture in a prompt that is text
    max_length: int | None  # positions that the model knows

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> PromptSettings:
        chat: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in found["chat"].items()
        }
        token = found["image_token"]
        pair = None if token is None else (str(token[0]), int(token[1]))
        return cls(ChatTemplate(**chat), pair, found["image_mark"], found["max_length"])


def settings_of(folder: Path) -> PromptSettings:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return PromptSettings.from_json(config["gemoe"]["prompts"])


def local_folder(name: Any, options: Mapping[str, Any], patterns: Sequence[str]) -> Path:
    """The exported folder; of a name on the Hub its files of these patterns are downloaded."""
    inner = options.get("subfolder") or ""
    if Path(name).is_dir():
        return Path(name, inner)
    wanted = [str(PurePosixPath(inner, pattern)) for pattern in patterns]
    return Path(snapshot_download(str(name), allow_patterns=wanted, **where(options)), inner)
