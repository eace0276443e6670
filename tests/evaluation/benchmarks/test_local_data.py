"""Data is found in a folder and in both caches of Hugging Face; what is nowhere is told at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
from huggingface_hub import snapshot_download

from gemoe_ds.errors import ConfigError, DataError
from gemoe_ds.evaluation.benchmarks import local_data
from gemoe_ds.evaluation.benchmarks.load_tasks import load_tasks
from gemoe_ds.evaluation.benchmarks.local_data import DataPlaces
from gemoe_ds.evaluation.benchmarks.task_options import TaskOptions

REVISION = "a" * 40


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where snapshots are found without a network; empty."""

    def snapshots(repository: str, **options: object) -> str:
        return snapshot_download(repository, cache_dir=tmp_path / "cache", **options)

    monkeypatch.setattr(local_data, "snapshot_download", snapshots)
    return tmp_path / "cache"


def test_what_is_missing_is_one_line(miniature: Path, hub_cache: Path, tmp_path: Path) -> None:
    root = tmp_path / "my data"
    shutil.copytree(miniature / "openai" / "gsm8k", root / "openai" / "gsm8k")
    options = TaskOptions(data=DataPlaces(root))
    with pytest.raises(DataError) as caught:
        load_tasks(["gsm8k", "pope", "gqa", "hellaswag"], options)
    told = str(caught.value)
    assert "data of 3 repositories" in told and "gsm8k" not in told
    command = "hf download --repo-type dataset lmms-lab-encoder/GQA --local-dir '"
    assert f"{command}{root}/lmms-lab-encoder/GQA'" in told and told.count("hf download") == 3
    with pytest.raises(DataError, match="then give --data-root benchmark_data"):
        load_tasks(["gsm8k"], TaskOptions())


def test_a_snapshot_of_the_hub_s_cache(miniature: Path, hub_cache: Path) -> None:
    folder = hub_cache / "datasets--openai--gsm8k"
    shutil.copytree(miniature / "openai" / "gsm8k", folder / "snapshots" / REVISION)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    here = Path.cwd()
    (task,) = load_tasks(["gsm8k"], TaskOptions())
    assert task.num_documents == 7 and Path.cwd() == here


def test_the_arrow_cache(
    miniature: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `load_dataset` has left it, which was online."""
    prepared = tmp_path / "prepared"
    source = str(miniature / "openai" / "gsm8k")
    datasets.load_dataset(source, "main", cache_dir=str(prepared))
    (made,) = {path.parent for path in prepared.rglob("dataset_info.json")}
    cache = tmp_path / "arrow"
    shutil.copytree(made, cache / "openai___gsm8k" / "main" / "0.0.0" / REVISION)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    (task,) = load_tasks(["gsm8k"], TaskOptions())
    assert task.num_documents == 7


def test_nothing_asks_the_network_unless_told(
    miniature: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with local_data.data_of([], DataPlaces(miniature)):
        assert huggingface_hub.constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        load_tasks(["gsm8k"], TaskOptions(data=DataPlaces(download=True)))


def test_a_root_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data-root .*nowhere: no such folder"):
        load_tasks(["gsm8k"], TaskOptions(data=DataPlaces(tmp_path / "nowhere")))


def test_a_damaged_repository_is_named(tmp_path: Path, hub_cache: Path) -> None:
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    with pytest.raises(DataError, match="gsm8k: lm_eval 0.4.13 cannot load it"):
        load_tasks(["gsm8k"], TaskOptions(data=DataPlaces(tmp_path)))
