"""A name of the Hub is a snapshot of the local cache, whole, or a line with the command."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest

from gemoe_ds.config.paths import Places
from gemoe_ds.errors import ConfigError
from gemoe_ds.registry import Reads

COMMIT, OLDER = "a" * 40, "b" * 40
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
MODEL, TOKENIZER = Reads(of_hub="model"), Reads(of_hub="tokenizer")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(
    cache: Path, *names: str, name: str = "org/moe", commit: str = COMMIT, ref: str = "main"
) -> Path:
    """A snapshot as huggingface_hub leaves it: links to blobs."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in names:
        (root / "blobs" / file).write_text(
            json.dumps({"weight_map": dict(enumerate(SHARDS))} if file == INDEX else {})
        )
        (snapshot / file).symlink_to(f"../../blobs/{file}")
    if ref:
        (root / "refs" / ref).write_text(commit)
    return snapshot


def locate(text: str, reads: Reads = MODEL) -> Path:
    return Places.beside().locate("model.checkpoint", text, reads)


def refusal(text: str, reads: Reads = MODEL) -> str:
    with pytest.raises(ConfigError) as error:
        locate(text, reads)
    assert "\n" not in str(error.value)
    return str(error.value)


WHOLE = ("config.json", INDEX, *SHARDS, "tokenizer.json")


def test_a_name_is_its_snapshot_and_a_folder_of_that_name_comes_first(
    cache: Path, tmp_path: Path
) -> None:
    snapshot = put(cache, *WHOLE)
    assert locate("org/moe") == locate("org/moe@main") == locate(f"org/moe@{COMMIT}") == snapshot
    assert locate("org/moe", TOKENIZER) == snapshot
    (tmp_path / "org/moe").mkdir(parents=True)
    assert locate("org/moe") == tmp_path / "org/moe"


def test_revisions_and_one_file_of_weights(cache: Path) -> None:
    put(cache, *WHOLE)
    older = put(cache, "config.json", "model.safetensors", commit=OLDER, ref="v1")
    assert locate("org/moe@v1") == older
    said = refusal("org/moe@v2")
    assert "models--org--moe has main, v1 of it" in said
    assert "`hf download org/moe --revision v2`" in said


def test_a_folder_of_the_cache_is_its_snapshot(cache: Path) -> None:
    snapshot = put(cache, *WHOLE)
    root = snapshot.parents[1]
    assert locate(str(root)) == snapshot == locate(str(snapshot))
    older = put(cache, *WHOLE, commit=OLDER, ref="")
    assert locate(str(root)) == snapshot
    (root / "refs/main").unlink()
    assert f"with {COMMIT}, {OLDER}; give one of its snapshots/" in refusal(str(root))
    for link in snapshot.iterdir():
        link.unlink()
    snapshot.rmdir()
    assert locate(str(root)) == older


@pytest.mark.parametrize("name", ["org/moe", "gpt2"])
def test_what_is_not_in_the_cache_costs_a_command(cache: Path, name: str) -> None:
    said = refusal(name)
    assert said.startswith(f"model.checkpoint={name}: no such file or folder (looked in ")
    assert said.endswith(f"it is not in {cache}: `hf download {name}`")


def test_the_folder_of_the_recipes_is_nobody_s_name(cache: Path) -> None:
    said = refusal("checkpoints/OLMoE-1B-7B")
    command = "hf download OWNER/OLMoE-1B-7B --local-dir checkpoints/OLMoE-1B-7B"
    assert said.endswith(f"to have the model there: `{command}`")


@pytest.mark.parametrize(
    "name", ["./org/moe", "a/b/c", "/org/moe", "org/a..b", "org--moe", "-", "@x"]
)
def test_what_is_no_name_is_a_path_only(cache: Path, name: str) -> None:
    assert "hf download" not in refusal(name)


@pytest.mark.parametrize(
    ("files", "reads", "lacks"),
    [
        (WHOLE[1:], MODEL, "config.json"),
        (("config.json", INDEX, SHARDS[1]), MODEL, SHARDS[0]),
        (("config.json", SHARDS[0]), MODEL, "the index of its 1 shards"),
        (("config.json",), MODEL, "its weights"),
        ((), MODEL, "config.json, its weights"),
        (("config.json", "tokenizer_config.json"), TOKENIZER, "tokenizer.json"),
    ],
)
def test_a_download_that_was_cut_short(
    cache: Path, files: tuple[str, ...], reads: Reads, lacks: str
) -> None:
    snapshot = put(cache, *files)
    for text in ("org/moe", str(snapshot.parents[1])):
        said = refusal(text, reads)
        assert f"its copy in the cache ({snapshot}) is incomplete: it lacks {lacks}; `hf" in said


def test_blobs_that_have_gone_and_files_of_the_hub_s_own_list(cache: Path) -> None:
    snapshot = put(cache, *WHOLE, "preprocessor_config.json")
    (snapshot.parents[1] / "blobs/preprocessor_config.json").unlink()
    assert "it lacks preprocessor_config.json" in refusal("org/moe")
    (snapshot / "preprocessor_config.json").unlink()
    assert locate("org/moe") == snapshot, "nothing says that it ever was there"
    listed = {name: {"size": 1, "blob_id": "c" * 40} for name in ("preprocessor_config.json", "x")}
    (snapshot.parents[1] / "trees").mkdir()
    text = json.dumps({"format_version": 1, "files": listed})
    (snapshot.parents[1] / "trees" / f"{COMMIT}.json").write_text(text)
    assert "it lacks preprocessor_config.json; " in refusal("org/moe")


@pytest.mark.parametrize(
    "text",
    ["org/moe/", "https://huggingface.co/org/moe", "hf://org/moe", "hf.co/org/moe/tree/main"],
)
def test_an_address_of_the_hub_is_its_name(cache: Path, text: str) -> None:
    snapshot = put(cache, *WHOLE)
    assert locate(text) == snapshot


def test_the_command_can_be_pasted(cache: Path) -> None:
    assert "`hf download org/moe --revision 'a b'`" in refusal("org/moe@a b")
