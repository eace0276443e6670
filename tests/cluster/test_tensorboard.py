"""TensorBoard over runs that were cut and requeued, looked at in a real browser."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gemoe_ds.analysis.drawing import COLOURS, IMAGE, TEXT
from gemoe_ds.analysis.record import write_record
from gemoe_ds.cli.analyze import main as analyze
from gemoe_ds.errors import REQUEUE
from tests.analysis.evaluations import evaluation
from tests.cluster.launches import STEPS, ranks, write_recipe
from tests.helpers import free_port
from tests.train.resuming import write_setting

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or ""
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not BROWSER, reason="no chromium: make cluster-tools"),
    pytest.mark.timeout(400),
]


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    """Two runs side by side, of which one was killed after its first steps and one warned; the
    figures of a report beside them."""
    root = tmp_path_factory.mktemp("board")
    setting, runs = write_setting(root / "setting"), root / "runs"
    for number, sent in enumerate((signal.SIGKILL, signal.SIGTERM)):
        # another rate: curves that do not lie on each other
        changes = {"monitor__tensorboard": True, "optim": {"lr": 1e-2 * (1 + number)}}
        every = {"checkpoint": {"every": 4, "keep": 2}}
        recipe, output = write_recipe(setting, runs / f"run-{number}", **changes, **every)
        with ranks(root / f"logs-{number}", recipe, 2) as running:
            running.wait_for_step(output, 14)
            running.signal(0, sent)
            codes = running.codes()
            assert codes == [REQUEUE] * 2 if sent == signal.SIGTERM else all(codes)
        with ranks(root / f"logs-{number}-again", recipe, 2) as running:
            assert running.codes() == [0, 0], running.log(0)
    folders = []
    for made, sample in (evaluation("top_k", 8, 0), evaluation("gemoe", None, 0.2)):
        write_record(root / "eval" / made.method, made, sample)
        folders.append(str(root / "eval" / made.method))
    analyze([*folders, "--out", str(root / "report"), "--tensorboard", str(runs / "figures")])
    return runs


@pytest.fixture(scope="module")
def board(logdir):
    """The address of a TensorBoard that has read everything."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--load_fast", "false"]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while len(_runs(address)) < 3:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.5)
        yield address
    finally:
        process.kill()
        process.wait()


def asked(address: str):
    with urllib.request.urlopen(address, timeout=10) as answer:
        return json.load(answer)


def _runs(address: str) -> list[str]:
    try:
        return asked(f"{address}/data/runs")
    except OSError:
        return []


NAMES = ["run-0/run/tensorboard", "run-1/run/tensorboard"]


def test_each_step_stands_once_and_runs_are_told_apart_by_their_folders(board):
    assert set(NAMES) < set(_runs(board))
    curves = []
    for name in NAMES:
        found = asked(
            f"{board}/data/plugin/scalars/scalars?run={name.replace('/', '%2F')}&tag=loss%2Flm"
        )
        assert [step for _, step, _ in found] == list(range(1, STEPS + 1))
        assert [clock for clock, _, _ in found] == sorted(clock for clock, _, _ in found)
        curves.append([value for _, _, value in found])
    assert curves[0] != curves[1]


def screen(address: str, folder: Path) -> np.ndarray:
    """What a browser shows, [height, width, 3]."""
    picture = folder / "screen.png"
    options = [
        "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-proxy-server",
        "--hide-scrollbars --disable-background-networking --disable-component-update",
        "--disable-sync --no-first-run --window-size=1400,900 --virtual-time-budget=20000",
    ]
    words = " ".join(options).split()
    subprocess.run(
        [BROWSER, *words, f"--user-data-dir={folder}/profile", f"--screenshot={picture}", address],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return np.asarray(Image.open(picture).convert("RGB"))


def painted(picture: np.ndarray, colour: str) -> tuple[int, int]:
    """Pixels of exactly one colour right of the side bar, and how many columns they reach over."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    _, columns = np.nonzero((picture[120:, 380:] == wanted).all(-1))
    return columns.size, int(np.ptp(columns)) if columns.size else 0


def test_curves_are_drawn(board, tmp_path):
    """Of both runs, in the colours that TensorBoard gives to the first two."""
    picture = screen(f"{board}/#scalars&_smoothingWeight=0&tagFilter=loss%7Cmean_k", tmp_path)
    for colour in ("#ff7043", "#0077bb"):
        pixels, width = painted(picture, colour)
        assert pixels > 1000 and width > 250, (colour, pixels, width)


def test_figures_are_shown(board, tmp_path):
    """The report's, in its own colours."""
    tags = asked(f"{board}/data/plugin/images/tags")["figures"]
    assert len(tags) >= 3 and all(tag.startswith("report/") for tag in tags)
    picture = screen(f"{board}/#images&tagFilter=report", tmp_path)
    for colour in (COLOURS["gemoe"], IMAGE, TEXT):
        pixels, width = painted(picture, colour)
        assert pixels > 500 and width > 250, (colour, pixels, width)
