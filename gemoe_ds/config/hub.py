"""Models of the Hugging Face Hub that are on this machine already; nothing is fetched."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from gemoe_ds.errors import ConfigError

_PAGE = re.compile(r"^(https?://)?(www\.)?(huggingface\.co|hf\.co)/|^hf://(models/)?")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"-\d+-of-\d+\.(safetensors|bin)$")
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")
_FOLDER = "checkpoints/"  # where the recipes that ship look for models: no owner's name
_SMALL = {  # of these the Hub's own list of files, where it is here too, must be complete
    "model": ["*.json"],
    "tokenizer": ["tokenizer*", "special_tokens*", "added_tokens*", "vocab*", "merges*", "chat*"],
}


def snapshot_of(name: str, said: str, of_hub: str, not_found: str) -> Path:
    """The folder of `owner/name[@revision]` in the local cache; ConfigError if it is not there.

    `said`: key and value as the user wrote them; `not_found`: what to say of what is no such name.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, _, revision = _PAGE.sub("", name).rstrip("/").replace("/tree/", "@").partition("@")
    command = _command(repository, revision, of_hub)
    try:
        # an empty list of files: the folder, whatever is in it
        found = snapshot_download(
            repository, revision=revision or None, allow_patterns=[], local_files_only=True
        )
    except HFValidationError:
        raise ConfigError(not_found) from None
    except LocalEntryNotFoundError:
        if repository.startswith(_FOLDER):
            fetch = f"hf download OWNER/{repository.removeprefix(_FOLDER)} --local-dir {repository}"
            raise ConfigError(f"{not_found}; to have the model there: `{fetch}`") from None
        root = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
        known = f"it is not in {root.parent}"
        if root.is_dir():
            known = f"{root} has {', '.join(_revisions(root)) or 'nothing'} of it"
        raise ConfigError(
            f"{not_found}; if a model of the Hub is meant, {known}: `{command}`"
        ) from None
    return _whole(Path(found), said, of_hub, command)


def snapshot_in(folder: Path, said: str, of_hub: str) -> Path:
    """`folder`; if it is a model's folder of the cache, the snapshot that it means by default."""
    name = re.fullmatch("models--(.+)", folder.name)
    if not name or not (folder / "snapshots").is_dir():
        return folder
    main = folder / "refs/main"
    commits = sorted(path.name for path in (folder / "snapshots").iterdir())
    if main.is_file():
        commits = [main.read_text().strip()]
    if len(commits) != 1 or not (folder / "snapshots" / commits[0]).is_dir():
        raise ConfigError(
            f"{said}: a folder of the Hugging Face cache with "
            f"{', '.join(_revisions(folder)) or 'no revision'}; give one of its snapshots/"
        )
    command = _command(name[1].replace("--", "/"), "" if main.is_file() else commits[0], of_hub)
    return _whole(folder / "snapshots" / commits[0], said, of_hub, command)


def _command(repository: str, revision: str, of_hub: str) -> str:
    options = f" --revision {shlex.quote(revision)}" if revision else ""
    if of_hub == "tokenizer":
        options += " --exclude '*.safetensors' --exclude '*.bin'"
    return f"hf download {repository}{options}"


def _revisions(root: Path) -> list[str]:
    """The names under which a model's cache has something: branches, tags, or commits."""
    refs = (str(p.relative_to(root / "refs")) for p in (root / "refs").rglob("*") if p.is_file())
    return sorted(refs) or sorted(path.name for path in (root / "snapshots").glob("*"))


def _whole(snapshot: Path, said: str, of_hub: str, command: str) -> Path:
    missing = list(_missing(snapshot, of_hub))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"{said}: its copy in the cache ({snapshot}) is incomplete: it lacks "
            f"{', '.join(missing[:3])}{more}; `{command}` brings the rest"
        )
    return snapshot


def _missing(snapshot: Path, of_hub: str) -> Iterator[str]:
    """What a download that was cut short has left out."""
    if unlisted := _unlisted(snapshot, of_hub):
        yield unlisted
        return
    for path in sorted(snapshot.iterdir()):
        if not path.exists():  # a link to what is not there
            yield path.name
    if of_hub == "tokenizer":
        if not any(path for pattern in _TOKENIZERS for path in snapshot.glob(pattern)):
            yield "tokenizer.json"
        return
    if not (snapshot / "config.json").is_file():
        yield "config.json"
    index = next((snapshot / name for name in _INDEXES if (snapshot / name).is_file()), None)
    weights = [p.name for p in snapshot.iterdir() if p.suffix in (".safetensors", ".bin")]
    if index:
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            return  # damaged, as whoever reads it says
        yield from sorted(str(name) for name in files if not (snapshot / str(name)).exists())
    elif not weights:
        yield "its weights"
    elif all(_SHARD.search(name) for name in weights):
        yield f"the index of its {len(weights)} shards"


def _unlisted(snapshot: Path, of_hub: str) -> str | None:
    """The files that the Hub has, by huggingface_hub's copy of its list, and that are not here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    root = snapshot.parents[1]
    try:
        snapshot_download(
            root.name.removeprefix("models--").replace("--", "/"),
            revision=snapshot.name,
            cache_dir=root.parent,
            allow_patterns=_SMALL[of_hub],
            ignore_patterns=["*/*"],
            local_files_only=True,
        )
    except LocalEntryNotFoundError as error:
        found = re.search(r"are missing \((.+?)\)\. ", str(error))
        return found[1] if found else None
    return None
