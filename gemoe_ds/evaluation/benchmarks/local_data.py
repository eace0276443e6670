"""Data where the user has it: a folder that mirrors the hub, the hub's cache, the arrow cache.

`load_dataset("openai/gsm8k")` takes a folder openai/gsm8k of the working directory before it asks
the hub. So tasks are loaded and scored in a folder of links to what is here, and no task's own
configuration changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from gemoe_ds.errors import ConfigError, DataError

METRICS = Path(__file__).with_name("metrics")  # code_eval, which is on the hub, too
# What `load_dataset` calls a format, not a repository: the files are named beside it.
_FORMATS = {"json", "csv", "parquet", "text", "arrow", "imagefolder", "webdataset", "generator"}


@dataclass(frozen=True)
class DataPlaces:
    root: Path | None = None  # ROOT/owner/name, as `hf download --local-dir` fills it
    download: bool = False  # what is missing is fetched, into root if there is one


@contextlib.contextmanager
def data_of(leaves: Sequence[Any], places: DataPlaces) -> Iterator[None]:
    """The working directory is one where all data of these tasks is found. Nothing is fetched,
    unless places say so. DataError that lists all that is missing."""
    if places.root is not None and not places.root.is_dir():
        raise ConfigError(f"--data-root {places.root}: no such folder")
    needed: dict[str, list[str]] = {}
    for leaf in leaves:
        repository, config = leaf.data
        if repository and repository not in _FORMATS and not Path(repository).is_absolute():
            needed.setdefault(repository, []).append(config or "default")
    links, missing = {}, []
    for repository, configs in needed.items():
        found = _found(repository, places)
        if found is not None:
            links[repository] = found
        elif not _in_arrow_cache(repository, configs):
            missing.append(repository)
    if missing and places.download:
        links |= {repository: _downloaded(repository, places) for repository in missing}
    elif missing:
        raise DataError(_message(missing, places))
    with contextlib.chdir(_view(links)), _network(places.download):
        yield


def _found(repository: str, places: DataPlaces) -> Path | None:
    if places.root is not None and (places.root / repository).is_dir():
        return (places.root / repository).resolve()
    try:
        return Path(snapshot_download(repository, repo_type="dataset", local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _in_arrow_cache(repository: str, configs: Sequence[str]) -> bool:
    """Whether `load_dataset` left all of these there, when it was online."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / repository.replace("/", "___")
    return all((folder / config).is_dir() for config in configs)


def _downloaded(repository: str, places: DataPlaces) -> Path:
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConfigError("--download: HF_HUB_OFFLINE is set, which forbids it; unset it")
    folder = None if places.root is None else places.root / repository
    try:
        return Path(snapshot_download(repository, repo_type="dataset", local_dir=folder))
    except (HfHubHTTPError, OSError, HFValidationError) as error:
        raise DataError(f"--download {repository}: {' '.join(str(error).split())}") from error


def _message(missing: Sequence[str], places: DataPlaces) -> str:
    root = places.root or Path("benchmark_data")
    lines = [
        f"hf download --repo-type dataset {repository} --local-dir {shlex.quote(str(folder))}"
        for repository in missing
        for folder in [root / repository]
    ]
    where = "" if places.root else f", then give --data-root {root}"
    return (
        f"data of {len(missing)} repositories is neither in --data-root nor in a cache of Hugging "
        f"Face. Run, where there is network{where} (or give --download): {' && '.join(lines)}"
    )


def _view(links: Mapping[str, Path]) -> Path:
    """A folder of links. The same for the same links: `load_dataset` knows what it has prepared
    before by the path that it was read from."""
    links = dict(links) | {folder.name: folder for folder in METRICS.iterdir() if folder.is_dir()}
    told = "\n".join(f"{name} {path}" for name, path in sorted(links.items()))
    above = Path(tempfile.gettempdir()) / f"gemoe_data_{os.getuid()}"
    above.mkdir(mode=0o700, exist_ok=True)
    if above.stat().st_uid != os.getuid():
        raise DataError(f"{above} is another user's; set TMPDIR to a folder of your own")
    view = above / hashlib.sha256(told.encode()).hexdigest()[:16]
    for name, path in links.items():
        link = view / name
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # of this process, or of another rank
            link.symlink_to(path)
    return view


@contextlib.contextmanager
def prepared_apart(repository: str) -> Iterator[None]:
    """Within `data_of`, while a task of this repository is loaded: `load_dataset` keeps what it has
    prepared by the files that it was prepared from.

    It goes by the folder's name alone, and gives what it has prepared from other files of that name
    before: of another folder, or of this one before it was fetched again.
    """
    here = Path.cwd() / repository
    if not repository or Path(repository).is_absolute() or not here.is_dir():
        yield
        return
    above = Path(datasets.config.HF_DATASETS_CACHE)
    own = above / "gemoe" / f"{repository.replace('/', '___')}-{_stamp(here.resolve())}"
    variable = "LMMS_EVAL_DATASETS_CACHE"
    environment = os.environ.get(variable)
    datasets.config.HF_DATASETS_CACHE, os.environ[variable] = own, str(own)
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = above
        os.environ.pop(variable)
        if environment is not None:
            os.environ[variable] = environment


@cache
def _stamp(folder: Path) -> str:
    """Of all files of a folder: names, sizes and times; not of what `hf download` notes down."""
    notes = folder / ".cache"
    files = [path for path in folder.rglob("*") if path.is_file() and notes not in path.parents]
    told = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _network(allowed: bool) -> Iterator[None]:
    """Without leave nothing asks the hub, whatever the environment says."""
    switches = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in switches]
    try:
        if not allowed:
            for module, name in switches:
                setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)
