"""OUT.partial: who may go on, from where, and what becomes of shards that are not whole."""

from __future__ import annotations

import fcntl
import json
import os

import pytest

from gemoe_ds.data.sources import convert as convert_module
from gemoe_ds.data.sources.convert import Settings, convert
from gemoe_ds.errors import ConfigError, DataError, OutputError

NUMBER = 20


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of ours handles it."""


def write_rows(folder, number=NUMBER, bad=()):
    rows = [
        {"id": n, "messages": [{"role": "user", "content": f"{n}"},
         {"role": "assistant", "content": " " if n in bad else "x", "name": "y"}]}
        for n in range(number)
    ]  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(rows))


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A conversion in shards of 4 that ended without a word in its fourth shard."""
    write_rows(tmp_path)
    settings = Settings(tmp_path / "rows.json", tmp_path / "out", shard_size=4)
    write, written = convert_module.write_shard, []

    def until_killed(*arguments):
        written.append(write(*arguments))
        if len(written) == 4:
            raise Killed
        return written[-1]

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(convert_module, "write_shard", until_killed)
        patch.setattr("gemoe_ds.data.partial._tidy", lambda partial: None)
        convert(settings)
    return settings


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def whole(settings, tmp_path):
    """What the conversion gives in one go."""
    out = tmp_path / "whole"
    convert(Settings(settings.path, out, shard_size=4))
    return files(out)


def test_it_goes_on_behind_the_finished_shards(begun, tmp_path, capsys):
    partial = tmp_path / "out.partial"
    names = {
        "conversion.json",
        *(f"part-{n:05d}.{end}" for n in range(3) for end in ("arrow", "json")),
    }
    assert set(files(partial)) == names | {"part-00003.arrow"}
    (partial / "part-00009.arrow").write_bytes(b"of an end without a word")
    convert(begun)
    assert "3 shards of 12 samples are finished" in capsys.readouterr().out
    assert files(tmp_path / "out") == whole(begun, tmp_path)
    assert not partial.exists()


@pytest.mark.parametrize("harm", ["cut", "flipped", "no_shard", "no_sidecar", "bad_sidecar"])
def test_from_a_shard_that_is_not_whole_on_it_begins_again(begun, tmp_path, capsys, harm):
    shard, sidecar = (tmp_path / "out.partial/part-00001").with_suffix(".arrow"), None
    sidecar, content = shard.with_suffix(".json"), bytearray(shard.read_bytes())
    match harm:
        case "cut":
            shard.write_bytes(content[:-1])
        case "flipped":
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
        case "no_shard":
            shard.unlink()
        case "no_sidecar":
            sidecar.unlink()
        case "bad_sidecar":
            sidecar.write_text("{")
    convert(begun)
    assert "1 shards of 4 samples are finished" in capsys.readouterr().out
    assert files(tmp_path / "out") == whole(begun, tmp_path)


@pytest.mark.parametrize("step", range(6))
def test_killed_between_the_last_renames(begun, tmp_path, monkeypatch, step):
    """The names are given last; whoever comes next gives those that are missing."""
    rename, done = type(tmp_path).rename, []

    def until_killed(path, target):
        if len(done) == step:
            raise Killed
        done.append(rename(path, target))

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "rename", until_killed)
        if step < 5:
            with pytest.raises(Killed):
                convert(begun)
        else:
            convert(begun)
    if step < 5:
        assert (tmp_path / "out.partial/manifest.json").exists()
        convert(begun)
    assert files(tmp_path / "out") == whole(begun, tmp_path)


def test_another_command_or_source_may_not_go_on(begun, tmp_path):
    before = files(tmp_path / "out.partial")
    other = Settings(begun.path, begun.out, shard_size=5)
    with pytest.raises(
        DataError, match="another command: shard_size was 4, and is 5; give the same"
    ):
        convert(other)
    write_rows(tmp_path, NUMBER + 1)
    with pytest.raises(DataError, match="its files have changed since; .* or remove .*out.partial"):
        convert(begun)
    assert files(tmp_path / "out.partial") == before
    (tmp_path / "out.partial/conversion.json").write_text("{")
    with pytest.raises(DataError, match="conversion.json is damaged"):
        convert(begun)
    (tmp_path / "out.partial/conversion.json").unlink()
    with pytest.raises(DataError, match="holds something else than a conversion"):
        convert(begun)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    write_rows(tmp_path)
    write = convert_module.write_shard

    def meanwhile(*arguments):
        os.utime(tmp_path / "rows.json", (1, 1))
        return write(*arguments)

    monkeypatch.setattr(convert_module, "write_shard", meanwhile)
    settings = Settings(tmp_path / "rows.json", tmp_path / "out", shard_size=4)
    with pytest.raises(DataError, match="have changed while they were read; remove .*out.partial"):
        convert(settings)
    assert not (tmp_path / "out").exists()


def test_two_at_once_are_refused(begun, tmp_path):
    descriptor = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is converting into it"):
        convert(begun)
    os.close(descriptor)
    convert(begun)
    with pytest.raises(ConfigError, match="exists already"):
        convert(begun)


def test_a_refused_conversion_goes_on_with_another_limit(tmp_path):
    """Too many drops, found at the end only, cost no shard that is finished."""
    write_rows(tmp_path)
    settings = Settings(tmp_path / "rows.json", tmp_path / "out", shard_size=4, min_image_size=4)
    rows = json.loads(settings.path.read_text())
    for row in rows[10:]:
        row |= {"images": ["none.png"]}
        row["messages"][0]["content"] = "<image>"
    settings.path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match="10 of 20 rows .*; .*out.partial stays: the same command"):
        convert(settings)
    assert len(list((tmp_path / "out.partial").glob("part-*.json"))) == 2
    manifest = convert(Settings(settings.path, settings.out, shard_size=4, max_bad_fraction=0.5))
    assert (manifest["num_samples"], manifest["num_dropped"]) == (10, 10)


def test_a_full_disk_is_one_line_and_keeps_what_is_finished(tmp_path, monkeypatch):
    write_rows(tmp_path)
    write, written = convert_module.write_shard, []

    def full(*arguments):
        written.append(write(*arguments))
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return written[-1]

    settings = Settings(tmp_path / "rows.json", tmp_path / "out", shard_size=4)
    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "write_shard", full)
        with pytest.raises(OutputError, match="No space left on device; 2 finished shards stay in"):
            convert(settings)
    convert(settings)
    assert files(tmp_path / "out") == whole(settings, tmp_path)
