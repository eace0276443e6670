"""What belongs to a model's folder beside its weights, and what training has left there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from gemoe_ds.hf_io.safetensors_reader import INDEX, open_file

_TOKENIZER = ("tokeniz*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*")
TEMPLATES = ("chat_template*", "*.jinja")
TOKENIZER = (*_TOKENIZER, *TEMPLATES, "*.model", "*.tiktoken")
# The base's own code goes along as text, for whoever runs the base; nothing of it is run here.
_NEEDED = ("*.json", "*.py", "LICENSE*", "LICENCE*", "NOTICE*", *TOKENIZER)
_LEFTOVERS = (
    *("trainer_state.json", "*_results.json", "adapter_*", "zero_to_fp32.py", "training_args*"),
    *("*.index.json", "provenance.json"),
    *("modeling_gemoe.py", "gemoe_*.py"),  # of an export that is a base now: written anew
)


def companions(folder: Path, patterns: Iterable[str] = _NEEDED) -> list[Path]:
    """The files of these names in a folder, without what a trainer or an export has left."""
    names = tuple(patterns)
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and _is_any(path.name, names) and not _is_any(path.name, _LEFTOVERS)
    ]


def write_index(folder: Path, file_of: Mapping[str, str]) -> None:
    """Which file holds which key: loaders that would take every *.safetensors go by it."""
    total = sum((folder / name).stat().st_size for name in set(file_of.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def index_files(folder: Path) -> None:
    """Write the index of a folder whose files are all there, if there are several."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        write_index(folder, {key: file.name for file in files for key in open_file(file)})


def _is_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
