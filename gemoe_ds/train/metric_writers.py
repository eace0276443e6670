"""Where the metrics of a run are written: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import json
import secrets
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from gemoe_ds.config import RunConfig
from gemoe_ds.errors import ConfigError, writing_to
from gemoe_ds.files import step_lines
from gemoe_ds.train.hooks import Hook, StepResult, Training
from gemoe_ds.train.monitor import METRICS

Values = Mapping[str, float | Tensor]  # scalars, and counts of the values 0..N-1


class MetricWriter(Protocol):
    """Takes the metrics of one step after the other. Only the first rank has any.

    On resume, what a lost stretch of the run had written after its start is dropped, so that no
    step appears twice.
    """

    def write(self, step: int, values: Values) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one object a line, `step` and every value by name."""

    def __init__(self, output: Path, start_step: int) -> None:
        path, kept = output / METRICS, []
        if start_step and path.exists():
            kept = [line for line, entry in step_lines(path) if entry["step"] <= start_step]
        path.write_text("".join(kept), encoding="utf-8")
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 (lives as long as the run)

    def write(self, step: int, values: Values) -> None:
        tensors = {n: torch.as_tensor(value, dtype=torch.float64) for n, value in values.items()}
        line = {"step": step} | {name: tensor.tolist() for name, tensor in tensors.items()}
        self.file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """tensorboard/: scalars, and vectors as histograms."""

    def __init__(self, output: Path, start_step: int) -> None:
        self.board = SummaryWriter(output / "tensorboard", purge_step=start_step + 1)

    def write(self, step: int, values: Values) -> None:
        for name, value in values.items():
            tensor = torch.as_tensor(value, dtype=torch.float64)
            if tensor.dim() == 0:
                self.board.add_scalar(name, tensor.item(), step)
            elif tensor.sum() > 0:
                self._histogram(name, tensor, step)

    def _histogram(self, name: str, counts_N: Tensor, step: int) -> None:
        """Without expanding the counts."""
        values = torch.arange(counts_N.numel()).double()
        self.board.add_histogram_raw(
            name,
            min=0.0,
            max=float(counts_N.numel() - 1),
            num=counts_N.sum().item(),
            sum=(counts_N * values).sum().item(),
            sum_squares=(counts_N * values.square()).sum().item(),
            bucket_limits=(values + 0.5).tolist(),
            bucket_counts=counts_N.tolist(),
            global_step=step,
        )

    def close(self) -> None:
        self.board.close()


class WeightsAndBiases:
    """A run in the project `monitor.wandb`, the same one after a resume; vectors as histograms.

    W&B's own variables (WANDB_ENTITY, WANDB_MODE, ...) say all the rest.
    """

    def __init__(self, config: RunConfig, output: Path, start_step: int) -> None:
        self.wandb = _wandb(config)
        file, run_id = output / "wandb_run_id", secrets.token_hex(4)
        if start_step and file.exists():
            run_id = file.read_text(encoding="utf-8").strip()
        file.write_text(run_id + "\n", encoding="utf-8")
        try:
            self.run = self.wandb.init(
                project=config.monitor.wandb,
                id=run_id,
                name=output.resolve().name,
                resume="allow",
                dir=str(output),
                config=config.model_dump(mode="json"),
            )
        except self.wandb.Error as error:
            raise ConfigError(f"monitor.wandb={config.monitor.wandb}: {error}") from error

    def write(self, step: int, values: Values) -> None:
        shown: dict[str, Any] = {}
        for name, value in values.items():
            tensor = torch.as_tensor(value, dtype=torch.float64)
            if tensor.dim() == 0:
                shown[name] = tensor.item()
            else:
                edges = (torch.arange(tensor.numel() + 1) - 0.5).tolist()
                shown[name] = self.wandb.Histogram(np_histogram=(tensor.tolist(), edges))
        self.run.log(shown, step=step)

    def close(self) -> None:
        self.run.finish()


def _wandb(config: RunConfig) -> Any:
    """The module, ready to write; ConfigError if it is not installed, or nobody is logged in."""
    said = f"monitor.wandb={config.monitor.wandb}"
    try:
        wandb: Any = importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"{said}: wandb cannot be imported ({error}): pip install wandb, or leave it null"
        ) from None
    if wandb.setup().settings.mode != "online":
        return wandb
    try:
        try:
            is_logged_in = wandb.login(prompt=False)
        except TypeError:  # an older version, which would ask at a terminal
            is_logged_in = bool(wandb.api.api_key)
    except wandb.Error as error:
        raise ConfigError(f"{said}: {error}; WANDB_MODE=offline writes to output_dir") from error
    if not is_logged_in:
        raise ConfigError(
            f"{said}: nobody is logged in: run `wandb login`, set WANDB_API_KEY, or "
            "WANDB_MODE=offline to write to output_dir"
        )
    return wandb


def check_writers(config: RunConfig) -> None:
    """Before anything is loaded, on the first rank: ConfigError if a writer will not work."""
    if config.monitor.wandb is not None:
        _wandb(config)


def open_writers(config: RunConfig, output: Path, start_step: int) -> list[MetricWriter]:
    """Those that the recipe asks for."""
    writers: list[MetricWriter] = [JsonLines(output, start_step)]
    if config.monitor.tensorboard:
        writers.append(TensorBoard(output, start_step))
    if config.monitor.wandb is not None:
        writers.append(WeightsAndBiases(config, output, start_step))
    return writers


class MetricsLog(Hook):
    """Writes the metrics of a step, where there are any."""

    def __init__(self, writers: Sequence[MetricWriter]) -> None:
        self.writers = writers

    def after_step(self, trainer: Training, result: StepResult) -> None:
        for name, value in result.metrics.items():
            if not isinstance(value, (Real, Tensor)):
                raise ConfigError(
                    f"step {result.step}: metric {name} is {value!r}; a hook adds numbers, and "
                    "tensors of counts"
                )
        if result.metrics:
            with writing_to(trainer.config.output_dir):
                for writer in self.writers:
                    writer.write(result.step, result.metrics)
