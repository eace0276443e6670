"""A conversion that is stopped leaves nothing: no folder, no temporary one."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[3] / "data_prep" / "convert_llava.py"


@pytest.fixture
def running(tmp_path):
    """A conversion of many large pictures that has written its first rows."""
    buffer = io.BytesIO()
    Image.effect_noise((1200, 1200), 80).save(buffer, "PNG", compress_level=1)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes(buffer.getvalue())
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    rows = [{"id": i, "image": "x.png", "conversations": talk} for i in range(20_000)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, SCRIPT, "--json", "rows.json", "--images", "images"]
    process = subprocess.Popen(
        [*command, "--out", "out", "--shard-size", "4"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # in the background of a script Ctrl-C would be ignored, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out.tmp-*/part-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield process, tmp_path
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_conversion_leaves_nothing(running, number):
    """A terminal's Ctrl-C and a scheduler's SIGTERM, with pictures under way in every thread."""
    process, folder = running
    process.send_signal(number)
    assert process.wait(timeout=30) != 0
    assert sorted(p.name for p in folder.iterdir()) == ["images", "rows.json"]
