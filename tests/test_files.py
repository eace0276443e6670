"""What is written is whole or absent, whatever ends the writing."""

from __future__ import annotations

import os
import signal

import pytest

from gemoe_ds import files
from gemoe_ds.errors import ConfigError, OutputError
from gemoe_ds.files import check_new, sha256_of, whole_folder, write_text, writing_into


def test_a_folder_is_there_once_it_is_whole(tmp_path):
    with whole_folder(tmp_path / "new/out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "new/out").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert (tmp_path / "new/out/a").read_text() == "1"


def test_everything_in_it_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    there, synced = tmp_path / "out", []
    monkeypatch.setattr(files, "fsync_path", lambda path: synced.append((path, there.exists())))
    with whole_folder(there) as folder:
        (folder / "a/b").mkdir(parents=True)
        (folder / "a/b/c").write_text("1")
    before = {path.relative_to(folder).as_posix() for path, is_named in synced if not is_named}
    assert before == {".", "a", "a/b", "a/b/c"} and synced[-1] == (tmp_path, True)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(28, "No space left on device"), OutputError),
        (ValueError("a library's full disk"), OutputError),
        (OutputError("said already"), OutputError),
        (ConfigError("of the block"), ConfigError),
        (RuntimeError("a bug"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_it_vanishes_whatever_ends_the_block(tmp_path, raised, expected):
    with pytest.raises(expected) as error, whole_folder(tmp_path / "out", (OSError, ValueError)):
        raise raised
    assert not list(tmp_path.iterdir())
    assert (error.value is raised) == (type(raised) is expected)


@pytest.fixture
def nobody_listens():
    """To SIGTERM, as in a process that has just started."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_it_vanishes_when_the_process_is_asked_to_end(tmp_path, nobody_listens):
    with pytest.raises(SystemExit) as left, whole_folder(tmp_path / "out"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 128 + signal.SIGTERM and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_where_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dead").symlink_to("nowhere")
    for out, words in (
        ("file/out", "is no folder that you may"),
        ("dead", "exists already"),
        ("file", "exists already"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_new(tmp_path / out)
        with pytest.raises(ConfigError, match=words), whole_folder(tmp_path / out):
            pass
    check_new(tmp_path / "new/out")


def test_a_text_replaces_the_one_before(tmp_path):
    for text in ("one", "two \N{SNOWMAN}"):
        write_text(tmp_path / "file", text)
        assert (tmp_path / "file").read_bytes() == text.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert sha256_of(tmp_path / "file").startswith("b5a3c107")


def test_a_folder_that_cannot_be_written_into_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: File exists: choose another --out"):
        with writing_into(tmp_path / "file"):
            pass
    for raised, words in (
        (OSError("of a library"), "new: of a library: choose"),
        (OutputError("x"), "^x$"),
    ):
        with pytest.raises(OutputError, match=words), writing_into(tmp_path / "new"):
            raise raised
