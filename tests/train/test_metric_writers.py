"""What is written of the metrics of a step."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gemoe_ds.errors import ConfigError
from gemoe_ds.train.metric_writers import JsonLines, TensorBoard, check_writers, open_writers
from gemoe_ds.train.monitor import METRICS, seconds_in
from tests.train.resuming import make_config


def test_numbers_are_written_as_they_are(tmp_path):
    for writer in (JsonLines(tmp_path, 0), TensorBoard(tmp_path, 0)):
        writer.write(3, {"lr/router": 3e-4, "k_histogram": torch.tensor([0.0, 4.0, 1.0])})
        writer.close()
    (line,) = map(json.loads, (tmp_path / METRICS).read_text().splitlines())
    assert line == {"step": 3, "lr/router": 3e-4, "k_histogram": [0, 4, 1]}
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (scalar,) = board.Scalars("lr/router")
    assert scalar.step == 3 and scalar.value == pytest.approx(3e-4)
    (histogram,) = [event.histogram_value for event in board.Histograms("k_histogram")]
    assert list(histogram.bucket_limit) == [0.5, 1.5, 2.5] and list(histogram.bucket) == [0, 4, 1]
    assert (histogram.num, histogram.sum, histogram.sum_squares) == (5, 6, 8)


def test_a_lost_stretch_is_dropped_and_a_cut_line_too(tmp_path):
    first = JsonLines(tmp_path, 0)
    for step in range(1, 5):
        first.write(step, {"loss": float(step)})
    first.close()
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 5, "lo')
    second = JsonLines(tmp_path, 2)
    second.write(3, {"loss": 9.0})
    second.close()
    lines = map(json.loads, (tmp_path / METRICS).read_text().splitlines())
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 9)]


def test_damaged_lines_end_no_continuation(tmp_path, capsys):
    first = JsonLines(tmp_path, 0)
    first.write(1, {"throughput/seconds": 2.0})
    first.close()
    with open(tmp_path / METRICS, "ab") as file:
        file.write(b'\0\0\0\n{"step": 7,\n[5]\n\xff\n{"step": 2, "throughput/seconds": 3.0}\n')
    assert seconds_in(tmp_path) == 5
    assert capsys.readouterr().out == f"{tmp_path / METRICS}: 4 damaged lines are left out\n"
    JsonLines(tmp_path, 2).close()
    assert "4 damaged lines" in capsys.readouterr().out
    lines = map(json.loads, (tmp_path / METRICS).read_text().splitlines())
    assert [line["step"] for line in lines] == [1, 2]


class StandIn(ModuleType):
    """In the place of wandb, which is not installed where tests run; writes down what it gets."""

    class Error(Exception):
        pass

    def __init__(self, mode: str = "online", login: object = True) -> None:
        super().__init__("wandb")
        self.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode))
        self.answer, self.begun, self.logged = login, [], []

    def login(self, prompt: bool) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def init(self, **settings) -> SimpleNamespace:
        self.begun.append(settings)
        write = lambda values, step: self.logged.append((step, values))  # noqa: E731
        return SimpleNamespace(log=write, finish=lambda: self.logged.append("end"))

    def Histogram(self, np_histogram) -> tuple:  # noqa: N802 (its name)
        return np_histogram


def wandb_config(output):
    folders = dict.fromkeys(("root", "hf", "tokenizer", "data"), output)
    return make_config(folders, output, monitor__wandb="my project")


def test_a_resumed_run_is_the_same_one_at_wandb(tmp_path, monkeypatch):
    config, wandb = wandb_config(tmp_path), StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start_step in (0, 3, 0):
        json_lines, writer = open_writers(config, tmp_path, start_step)
        writer.write(start_step + 1, {"lr": 3e-4, "k": torch.tensor([0.0, 4.0])})
        json_lines.close()
        writer.close()
    first, resumed, anew = wandb.begun
    assert first == resumed and first["project"] == "my project" and first["resume"] == "allow"
    assert first["id"] != anew["id"] and first["config"]["optim"]["lr"] == config.optim.lr
    values = {"lr": 3e-4, "k": ([0.0, 4.0], [-0.5, 0.5, 1.5])}
    assert wandb.logged == [(1, values), "end", (4, values), "end", (1, values), "end"]


@pytest.mark.parametrize(
    "wandb, words",
    [
        (None, "wandb cannot be imported .*: pip install wandb"),
        (StandIn(login=False), "nobody is logged in: run `wandb login`"),
        (StandIn(login=StandIn.Error("no such key")), "no such key; WANDB_MODE=offline"),
    ],
)
def test_a_writer_that_would_not_work_is_refused(tmp_path, monkeypatch, wandb, words):
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # None: as if it were not installed
    with pytest.raises(ConfigError, match=f"monitor.wandb=my project: {words}"):
        check_writers(wandb_config(tmp_path))
    monkeypatch.setitem(sys.modules, "wandb", StandIn("offline", login=False))
    check_writers(wandb_config(tmp_path))
