"""What an evaluation costs beyond its forwards: a few numbers a sample, and little time."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gemoe_ds.analysis.routing_sums import PROMPT, WRITTEN
from gemoe_ds.data.sample import Turn, of_turns, write_samples
from gemoe_ds.evaluation.routing import RoutingCounter
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.tiny.backbone import TinyBackbone
from gemoe_ds.moe.router import Router
from tests.helpers import repository
from tests.train.resuming import make_config, write_setting

SCRIPT = """
import sys
from gemoe_ds.cli.evaluate import main
main(sys.argv[1:])
lines = open("/proc/self/status")
print("peak", next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
"""


@pytest.mark.slow
def test_a_hundred_times_the_documents_take_little_more_memory(tmp_path):
    """What grows: questions, losses, lengths and rows of documents, numbers all; not tokens."""
    setting = write_setting(tmp_path / "setting")
    config = make_config(setting, tmp_path / "run", parallel__ep_size=1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.dump_yaml())
    peaks = {}
    for number in (1_000, 100_000):
        data, out = tmp_path / f"data_{number}", tmp_path / f"out_{number}"
        samples = (of_turns(f"s{i}", None, (Turn("c", "a b", "x"),)) for i in range(number))
        write_samples(samples, data, source="test")
        options = [recipe, "--data", data, "--out", out, "--batch", "100", "--k", "2"]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *map(str, options)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads((out / "eval.json").read_text())["num_questions_by_kind"] == {"x": number}
        peaks[number] = 1024 * int(done.stdout.split()[-1])
        print(f"{number:,} documents: {peaks[number] / 2**20:.0f} MiB")
    # Some 27 MB of it are the data's own cache, which has a bound.
    per_sample = (peaks[100_000] - peaks[1_000]) / 99_000
    assert per_sample < 1500, f"{per_sample:.0f} bytes a sample"


@pytest.mark.slow
def test_counting_takes_little_of_a_scoring_forward():
    """On the demo's backbone, 64 sequences of 80 tokens; the fastest of several."""
    folder = repository() / "experiments/backbones"
    gemoe = Router.named("gemoe")
    model = MoEModel.from_checkpoint(
        TinyBackbone(TinyBackbone.Config()),
        folder / "annealed",
        folder / "tokenizer",
        (gemoe, gemoe.Config()),
    ).eval()
    ids_BS = torch.randint(6, 100, (64, 80), generator=torch.Generator().manual_seed(0))
    is_written_BS = (torch.arange(80) >= 70).expand(64, 80)
    dummy = model.image_layout.dummy()
    inputs = {
        "input_ids_BS": ids_BS,
        "labels_BS": torch.where(is_written_BS, ids_BS, -100),
        "is_valid_BS": torch.ones_like(is_written_BS),
        "is_vision_BS": torch.zeros_like(is_written_BS),
        "images": {
            "pixels": torch.from_numpy(dummy.pixels),
            "feature_BS": torch.full_like(ids_BS, -1),
        },
    }
    kind_BS = torch.where(is_written_BS, WRITTEN, PROMPT)
    counter, model.ctx.trace = RoutingCounter.of(model), True
    forwards, counts = [], []
    for number in range(12):
        began = time.perf_counter()
        with torch.no_grad():
            model(**inputs, score=True)
        ran = time.perf_counter()
        counter.add(model.ctx, kind_BS, 64 * number + np.arange(64))
        forwards.append(ran - began)
        counts.append(time.perf_counter() - ran)
    share = min(counts) / min(forwards)
    print(f"counting {1000 * min(counts):.1f} ms of {1000 * min(forwards):.0f} ms: {share:.1%}")
    assert share < 0.05
