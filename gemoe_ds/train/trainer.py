"""The training loop: data, loss, DeepSpeed step, upkeep, metrics, checkpoints, in reading order."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gemoe_ds.backbones.model import MoEModel
from gemoe_ds.config import RunConfig
from gemoe_ds.data.collate import Batch
from gemoe_ds.engine.build import Engine, MovedCheck, title_of
from gemoe_ds.engine.distributed import World, sum_over_ranks
from gemoe_ds.engine.saver import Saver
from gemoe_ds.engine.zero import assign_
from gemoe_ds.errors import DataError
from gemoe_ds.moe.context import Stat
from gemoe_ds.train.ledger import Ledger
from gemoe_ds.train.monitor import Monitor, StatSum


class Trainer:
    """Runs the steps after `start_step` to `config.train.steps`, and saves where it is due.

    A step whose gradient holds a NaN or Inf anywhere changes nothing, on no rank: it is counted,
    and after `config.train.max_skipped_steps` of them the run saves and stops. `updates` are the
    steps that were not skipped.
    """

    def __init__(
        self,
        config: RunConfig,
        model: MoEModel,
        engine: Engine,
        steps: Iterator[list[Batch]],
        world: World,
        monitor: Monitor | None,
        saver: Saver | None,
        *,
        start_step: int = 0,
        skipped: int = 0,
        ledger: Ledger | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.engine = engine
        self.steps = steps
        self.world = world
        self.monitor = monitor
        self.saver = saver
        self.start_step = start_step
        self.skipped = skipped
        self.ledger = ledger
        self.stalled = 0.0  # seconds that saving has kept this rank from training, in all
        self.stats = StatSum()

    def run(self) -> None:
        config, total = self.config, self.config.train.steps
        fresh = self.start_step == self.skipped  # no update yet
        moved = MovedCheck(self.model, config.optim) if fresh else None
        bar = tqdm(
            initial=self.start_step,
            total=total,
            desc="training",
            unit="step",
            disable=not self.world.is_first,
            dynamic_ncols=True,
        )
        self.engine.train()
        window_start, window_tokens = time.perf_counter(), 0
        for step in range(self.start_step + 1, total + 1):
            due = step % config.monitor.every == 0 or step == total
            batches = next(self.steps)
            window_tokens += self.train_step(step, batches, collect=due)
            if self.engine.was_step_applied():
                if moved:
                    moved = moved.check()
                for layer in self.model.moe_layers:
                    layer.router.after_step(step, assign_)
            else:
                self._count_skipped(step)
            bar.update()

            # once in a while: metrics
            if due:
                self.stats.add("throughput/tokens", Stat(torch.tensor(window_tokens), "sum"))
                seconds = time.perf_counter() - window_start
                values = self._report(step, seconds)
                bar.set_postfix(self._summary(values))
                window_start, window_tokens = time.perf_counter(), 0

            # once in a while: checkpoint
            if step == total or (config.checkpoint.every and step % config.checkpoint.every == 0):
                assert self.saver is not None, "a dry run takes its step without `run`"
                began = time.perf_counter()
                self.saver.save(step, step - self.skipped)
                self.stalled += time.perf_counter() - began
        bar.close()

    def _count_skipped(self, step: int) -> None:
        self.skipped += 1
        most = self.config.train.max_skipped_steps
        if self.skipped > most:
            assert self.saver is not None
            self.saver.save(step, step - self.skipped)
            self.saver.wait()
            raise DataError(
                f"step {step}: the gradient is not finite (NaN or Inf), the {self.skipped}th time, "
                f"and train.max_skipped_steps={most}; look at the samples of that step "
                "(monitor.ledger=true) or lower optim.lr"
            )

    def train_step(self, step: int, batches: list[Batch], *, collect: bool) -> int:
        """One optimizer step on this rank's micro-batches; returns their valid tokens.

        Every target of the GLOBAL batch weighs the same: the cross-entropy of a micro-batch is
        divided by the mean number of targets over all micro-batches of all ranks, and DeepSpeed
        averages over both.
        """
        targets = torch.tensor(
            float(sum(batch.num_targets for batch in batches)), device=self.world.device
        )
        sum_over_ranks(targets)
        if targets == 0:
            raise DataError("a whole global batch has no target token; check the conversations")
        per_micro_batch = targets.item() / (len(batches) * self.world.size)
        tokens = 0
        for index, batch in enumerate(batches):
            block = ((step - 1) * len(batches) + index) * self.world.size + self.world.rank
            torch.manual_seed(micro_batch_seed(self.config.seed, block))
            if self.ledger:
                self.ledger.write(step, block, batch.ids)
            tokens += int(batch.is_valid_BS.sum())
            batch = batch.to(self.world.device)
            self.model.ctx.collect = collect
            parts = self.engine(
                input_ids_BS=batch.input_ids_BS,
                labels_BS=batch.labels_BS,
                is_valid_BS=batch.is_valid_BS,
                is_vision_BS=batch.is_vision_BS,
                pixels_NCHW=batch.pixels_NCHW,
                targets_per_micro_batch=per_micro_batch,
            )
            self.engine.backward(parts["loss"])
            if collect:
                self._collect(parts)
            self.engine.step()
        return tokens

    def _collect(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            self.stats.add(f"loss/{name}" if name != "loss" else "loss/total", Stat(value))
        for layer, record in enumerate(self.model.ctx.layers):
            for name, stat in record.stats.items():
                self.stats.add(f"{name}/layer_{layer:02d}", stat)

    def _report(self, step: int, seconds: float) -> dict[str, float | Tensor]:
        """Reduce the collected statistics over ranks and write them; all ranks must come here."""
        values: dict[str, float | Tensor] = dict(
            self.stats.reduced(sum_over_ranks, self.world.device)
        )
        tokens = torch.as_tensor(values.pop("throughput/tokens")).item()
        values["throughput/tokens_per_second"] = tokens / seconds
        values["throughput/seconds"] = seconds
        for name in [n for n in values if n.startswith("tokens_per_expert/")]:
            load_E = torch.as_tensor(values.pop(name))
            layer = name.split("/")[1]
            values[f"load_max_over_mean/{layer}"] = (
                load_E.max() / load_E.mean().clamp_min(1e-9)
            ).item()
            values[f"idle_experts/{layer}"] = float((load_E == 0).sum())
        mean_k = [v for n, v in values.items() if n.startswith("mean_k/")]
        values["mean_k"] = torch.stack(
            [torch.as_tensor(v).double().squeeze() for v in mean_k]
        ).mean()
        for group in self.engine.optimizer.param_groups:
            values[f"lr/{title_of(group)}"] = group["lr"]
        values["skipped_steps"] = self.skipped
        values["throughput/checkpoint_stall_seconds"] = self.stalled
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            values["grad_norm"] = float(norm)
        if self.monitor:
            self.monitor.write(step, values)
        return values

    @staticmethod
    def _summary(values: dict[str, float | Tensor]) -> dict[str, str]:
        shown = {
            "loss": values["loss/total"],
            "mean_k": values["mean_k"],
            "tokens/s": values["throughput/tokens_per_second"],
        }
        return {name: f"{float(value):.4g}" for name, value in shown.items()}


def micro_batch_seed(seed: int, block: int) -> int:
    """The random state of a micro-batch, from its number in the run and nothing else.

    So nothing needs to be stored, and a run that goes on with another number of ranks draws the
    numbers that it would have drawn.
    """
    state: int = np.random.SeedSequence([seed, block]).generate_state(1, np.uint64).item()
    return state
