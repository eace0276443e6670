"""A conversion that is killed or stopped goes on to the bytes of one that was not."""

from __future__ import annotations

import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from gemoe_ds.cli.data.convert import main
from gemoe_ds.data.sample import open_samples

SCRIPT = Path(__file__).resolve().parents[3] / "data_prep" / "convert_llava.py"
OPTIONS = ["--images", "images", "--shard-size", "4", "--dedup", "exact", "--out"]


def write_rows(folder: Path, number: int, size: int) -> None:
    """Rows of a few large pictures, some of them broken, gone, or in two rows alike."""
    (folder / "images").mkdir()
    for index in range(5):
        buffer = io.BytesIO()
        Image.effect_noise((size, size), 20 + index).save(buffer, "PNG", compress_level=1)
        (folder / f"images/{index}.png").write_bytes(buffer.getvalue())
    (folder / "images/5.png").write_bytes(buffer.getvalue()[:9000])
    rng = random.Random(0)
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": ""}]
    rows = []
    for row in range(number):
        talk[1]["value"] = f"Noise {row if row % 9 else 0}."
        name = f"{0 if row % 9 == 0 else rng.randrange(7 if row % 5 == 0 else 5)}.png"
        extra = {"tag": row} if row % 4 == 0 else {}
        rows.append({"id": row, "image": name, "conversations": [dict(t) for t in talk]} | extra)
    (folder / "rows.json").write_text(json.dumps(rows))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncut")
    write_rows(folder, 90, 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["rows.json", *OPTIONS, "whole"])
    assert open_samples(folder / "whole").manifest["num_dropped"] > 9
    return folder


def start(folder: Path, out: str, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, SCRIPT, "rows.json", *OPTIONS, out, *more],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # in the background of a script Ctrl-C would be ignored, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(process: subprocess.Popen[str], pattern: str, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not list(folder.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_conversion_goes_on_to_the_same_bytes(uncut, number, monkeypatch, capsys):
    """With pictures under way in every thread."""
    out = f"after_{int(number)}"
    process = start(uncut, out)
    wait_for(process, f"{out}.partial/part-00002.json", uncut)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 75 and "the same command goes on behind them" in said
        assert said.splitlines()[-1].startswith("stopped: ")
    assert not (uncut / out).exists()
    monkeypatch.chdir(uncut)
    main(["rows.json", *OPTIONS, out])
    assert "are finished; going on behind them" in capsys.readouterr().out
    assert files(uncut / out) == files(uncut / "whole")
    assert not (uncut / f"{out}.partial").exists()


@pytest.mark.slow
def test_ctrl_c_before_a_shard_is_finished_leaves_nothing(tmp_path):
    write_rows(tmp_path, 40, 1000)
    process = start(tmp_path, "out", "--shard-size", "4000")
    wait_for(process, "out.partial/part-00000.arrow", tmp_path)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75 and "no shard was finished" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "rows.json"]


@pytest.mark.slow
def test_killed_at_many_moments(tmp_path):
    """Ten times, at random, from the start of Python to the last rename."""
    write_rows(tmp_path, 900, 300)
    began = time.monotonic()
    subprocess.run(
        [sys.executable, SCRIPT, "rows.json", *OPTIONS, "whole"], cwd=tmp_path, check=True
    )
    takes, whole = time.monotonic() - began, files(tmp_path / "whole")
    rng, kills = random.Random(1), 0
    while kills < 10:
        process = start(tmp_path, "out")
        try:
            process.communicate(timeout=rng.uniform(0.1, 0.95) * takes)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        if (tmp_path / "out").exists():
            found = files(tmp_path / "out")
            found.pop("conversion.json", None)  # killed between the last two steps
            assert found == whole
            shutil.rmtree(tmp_path / "out")
        else:
            assert process.returncode
