"""The training loop: data, loss, DeepSpeed step, routers, metrics, hooks, in reading order."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from gemoe_ds.checkpoint.manifest import Checkpoint
from gemoe_ds.cluster.signals import who_asked
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.config import RunConfig
from gemoe_ds.console import Progress
from gemoe_ds.data.bad_samples import BadSample, BadSampleLog, listed
from gemoe_ds.data.collate import Batch
from gemoe_ds.data.row_names import Sources
from gemoe_ds.engine.build import Engine, MovedCheck, title_of
from gemoe_ds.engine.feed import on_device
from gemoe_ds.engine.world import World, gather_objects, sum_over_ranks
from gemoe_ds.engine.zero import assign_, full_value
from gemoe_ds.errors import DataError, Stopped
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe import metrics
from gemoe_ds.moe.context import Stat
from gemoe_ds.moe.step_context import StepContext
from gemoe_ds.moe.step_counts import StepCounts
from gemoe_ds.progress import COMPUTE, DATA, PROGRESS, UPDATE
from gemoe_ds.train.hooks import Hook, StepResult, by_name
from gemoe_ds.train.monitor import StatSum, in_short
from gemoe_ds.train.source_metrics import SourceMetrics


class _Totals(NamedTuple):
    """Of a step, over all micro-batches of all ranks."""

    targets: float
    groups: float  # of samples that share their auxiliary losses: those that have a token
    tokens: float
    distilled: float  # positions


class Trainer:
    """Runs the steps after `step` to `config.num_steps`; what goes on around them is for hooks.

    A step is one global batch, and one update of the optimizer unless the router wants more of the
    same samples (`Router.updates_per_batch`). An update whose gradient holds a NaN or Inf anywhere
    changes nothing, on no rank: it is counted, and after `config.train.max_skipped_steps` of them
    since this start the run saves and stops. `updates` are those that were not skipped. A step of
    which no sample can be used is empty: no rank computes anything, and the learning rate waits for
    the next one.
    """

    def __init__(
        self,
        config: RunConfig,
        model: MoEModel,
        engine: Engine,
        steps: Iterator[list[Batch]],
        world: World,
        hooks: Sequence[Hook] = (),
        *,
        resumed: Checkpoint | None = None,
        stop: StopRequest | None = None,
        bad_samples: BadSampleLog | None = None,
        sources: Sources | None = None,
    ) -> None:
        """`sources`: of the samples, to be told apart in the metrics."""
        self.config = config
        self.model = model
        self.engine = engine
        self.steps = steps
        self.world = world
        self.hooks = by_name(hooks)
        self.resumed = resumed
        self.step = resumed.step if resumed else 0  # the last whole one
        self.updates = resumed.updates if resumed else 0
        self.updates_per_batch = model.updates_per_batch
        self.num_groups = config.train.micro_batch_size // config.train.loss_batch_size
        self.empty_steps = resumed.empty_steps if resumed else 0
        self.skipped = (self.step - self.empty_steps) * self.updates_per_batch - self.updates
        self.before = self.step, self.skipped  # this start
        self.stop = stop or StopRequest()
        if bad_samples is None:
            bad_samples = BadSampleLog(config.data.max_bad_samples, 2**63, gather_objects)
        self.bad_samples = bad_samples
        self.end_reason: str | None = None
        self.stalled = 0.0  # seconds that saving has kept this rank from training, in all
        self.timed: list[tuple[int, float]] = []  # tokens and seconds of each step since a report
        self.is_warm = False  # the first step after a start warms everything up
        self.rates: dict[str, float] = {}  # of every group, as the last update found them
        self.stats = StatSum()
        self.by_source = SourceMetrics(sources, len(model.moe_layers))
        self.step_counts = StepCounts(len(model.moe_layers))
        for layer in model.moe_layers:
            layer.router.before_steps(layer.experts, full_value, model.shard.broadcast_from_first)

    def run(self) -> None:
        """All steps that are left, if no hook ends them early; `finish` is to follow."""
        config, total = self.config, self.config.num_steps
        moved = None if self.updates else MovedCheck(self.model, config.optim)
        states = self.resumed.manifest.get("hooks", {}) if self.resumed else {}
        for name, hook in self.hooks.items():
            if name in states:
                hook.load_state_dict(states[name])
        for hook in self.hooks.values():
            hook.before_run(self)
        bar = Progress(
            initial=self.step,
            total=total,
            desc="training",
            unit="step",
            disable=not self.world.is_first,
        )
        shown: dict[str, str] = {}
        self.engine.train()
        while self.step < total and self.end_reason is None:
            step = self.step + 1
            due = step % config.monitor.every == 0 or step == total
            began = time.perf_counter()
            PROGRESS.enter(DATA, step)
            batches = next(self.steps)
            tokens = self.train_step(step, batches, collect=due)
            seconds = time.perf_counter() - began
            self.step = step
            self.timed.append((tokens, seconds))
            if moved and self.updates:
                moved.check()
                moved = None
            bar.update()
            result = StepResult(step, tokens, seconds, self._metrics() if due else {})
            for hook in self.hooks.values():
                hook.after_step(self, result)
            shown |= in_short(result.metrics)
            if result.metrics:
                bar.set_postfix(shown)
            if self.newly_skipped > config.train.max_skipped_steps:
                self._give_up()
        bar.close()

    @property
    def newly_skipped(self) -> int:
        """Since this start: what the run has skipped before it is no reason to stop again."""
        return self.skipped - self.before[1]

    def end(self, reason: str) -> None:
        """Take no further step; `reason` ends a line. All ranks must call it at the same step."""
        self.end_reason = reason

    def finish(self) -> None:
        """After `run`, or instead of its next step: save and close. Collective."""
        for hook in self.hooks.values():
            hook.after_run(self)

    def end_with(self, error: Exception) -> NoReturn:
        """Save what there is, and raise; on all ranks. Collective."""
        self.finish()
        raise error

    def _give_up(self) -> NoReturn:
        limit = self.config.train.max_skipped_steps
        error = DataError(
            f"step {self.step}: the gradient is not finite (NaN or Inf); steps skipped for that "
            f"since step {self.before[0]}: {self.newly_skipped}, and "
            f"train.max_skipped_steps={limit}; look at the samples of that step "
            "(monitor.sample_log=true), lower optim.lr, or raise train.max_skipped_steps"
        )
        self.end_with(error)

    def _after_update(self, step: int) -> None:
        """Count it, and call the routers' `after_step`; all ranks must come here."""
        layers, model = self.step_counts.reduced(sum_over_ranks)
        if not self.engine.was_step_applied():
            self.skipped += 1
            return
        self.updates += 1
        for layer, sums in zip(self.model.moe_layers, layers, strict=True):
            layer.router.after_step(
                StepContext(
                    step=step,
                    total_steps=self.config.num_steps,
                    layer=sums,
                    model=model,
                    assign_=assign_,
                    read_param=full_value,
                    experts=layer.experts,
                    first_expert=self.model.shard.local(layer.router.spec.num_experts).start,
                    broadcast_from_first=self.model.shard.broadcast_from_first,
                )
            )

    def train_step(self, step: int, batches: list[Batch], *, collect: bool) -> int:
        """The updates of one step on this rank's micro-batches; returns their valid tokens.

        Every target of the GLOBAL batch weighs the same: the cross-entropy of a micro-batch is
        divided by the mean number of targets over all micro-batches of all ranks, and DeepSpeed
        averages over both. So does every position that is distilled. Auxiliary losses are averaged
        over the groups of samples that have a token, or over the tokens.
        """
        totals = self._agree(step, batches)
        PROGRESS.enter(COMPUTE, step)
        seeds = []
        for index, batch in enumerate(batches):
            seeds.append(self._seeds(self.block(step, index, len(batches))))
            self.stats.add("data/cut_answers", Stat(torch.tensor(batch.cut_answers), "sum"))
            self.stats.add("data/left_out", Stat(torch.tensor(len(batch.bad)), "sum"))
        for hook in self.hooks.values():
            hook.before_step(self, step, batches)
        if totals.targets == 0:
            self._pass_over(step)
            return 0
        before: list[dict[str, Any]] = [{} for _ in batches]
        for update in range(self.updates_per_batch):
            moved = on_device(batches, self.world.device)
            for index, (batch, there) in enumerate(zip(batches, moved, strict=True)):
                inputs = there.inputs
                self._begin_drawing(seeds[index])
                if update == 0:
                    before[index] = self._forwards_before(inputs)
                self.model.ctx.collect = collect
                self.by_source.begin(self.model.ctx, batch, self.world.device, collect)
                parts = self.engine(
                    **inputs,
                    **before[index],
                    **self._weights(batch, totals, len(batches) * self.world.size),
                )
                if update == self.updates_per_batch - 1:
                    before[index] = {}
                self.engine.backward(parts["loss"])
                self.step_counts.add(self.model.ctx)
                if collect:
                    self._collect(parts, batch, update)
                PROGRESS.enter(UPDATE)
                groups = self.engine.optimizer.param_groups
                self.rates = {title_of(group): group["lr"] for group in groups}
                self.engine.step()  # which sets the next update's rates
                self.model.ctx.collect, self.model.ctx.source_B = False, None
                self.model.ctx.num_groups, self.model.ctx.drawn_G = 1, None
                PROGRESS.enter(COMPUTE)
            self._after_update(step)
        return sum(int(batch.is_valid_BS.sum()) for batch in batches)

    @torch.no_grad()
    def _forwards_before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the forward that trains is given of others on the same inputs, by argument."""
        found: dict[str, Any] = {}
        if self.model.rollouts:
            found["rolled_out"] = self.engine(**inputs, roll_out=True)
        if self.model.distill:
            found |= self.engine(**inputs, teach=True)
        return found

    def _weights(self, batch: Batch, totals: _Totals, micro_batches: int) -> dict[str, float]:
        """What makes the parts of its loss those of the whole step, of so many micro-batches."""
        groups, tokens = batch.groups_with_tokens(self.num_groups), int(batch.is_valid_BS.sum())
        return {
            "targets_per_micro_batch": totals.targets / micro_batches,
            "distilled_per_micro_batch": totals.distilled / micro_batches,
            "auxiliary_weight": groups * micro_batches / totals.groups,
            "token_weight": tokens * micro_batches / totals.tokens,
        }

    def _seeds(self, block: int) -> list[int]:
        """Of the groups of a micro-batch, by their numbers in the run."""
        first = block * self.num_groups
        return [micro_batch_seed(self.config.seed, first + i) for i in range(self.num_groups)]

    def _begin_drawing(self, seeds: list[int]) -> None:
        """The random state of a micro-batch; routers find a number drawn for each group."""
        self.model.ctx.num_groups = self.num_groups
        drawn = [torch.rand((), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.model.ctx.drawn_G = torch.stack(drawn)
        torch.manual_seed(seeds[0])

    def _agree(self, step: int, batches: list[Batch]) -> _Totals:
        """Over all ranks; ends the run if a rank was asked to stop, or has met too many bad
        samples. One collective, as a rule."""
        new = self.bad_samples.unknown(bad for batch in batches for bad in batch.bad)
        here = [sum(batch.num_targets for batch in batches), len(new), bool(self.stop.by)]
        here.append(sum(batch.groups_with_tokens(self.num_groups) for batch in batches))
        here.append(sum(int(batch.is_valid_BS.sum()) for batch in batches))
        here.append(sum(self._num_distilled(batch) for batch in batches))
        agreed = torch.tensor(here, dtype=torch.float64, device=self.world.device)
        sum_over_ranks(agreed)
        targets, num_new, stops, groups, tokens, distilled = agreed.tolist()
        if stops:
            asked = f"{who_asked(self.stop)}, after step {self.step}"
            self.end_with(Stopped(f"{asked}; resume=auto goes on from there"))
        if num_new:
            self._leave_out(new, step)
        return _Totals(targets, groups, tokens, distilled)

    def _num_distilled(self, batch: Batch) -> int:
        distill = self.model.distill
        if distill is None:
            return 0
        return int(distill.positions(batch.labels_BS, batch.model_inputs).sum())

    def block(self, step: int, index: int, num_micro_batches: int) -> int:
        """The number in the run of a micro-batch of this rank and step."""
        return ((step - 1) * num_micro_batches + index) * self.world.size + self.world.rank

    def _leave_out(self, new: list[BadSample], step: int) -> None:
        """List bad samples that a rank has met in this step; DataError, with all before it saved,
        if they are too many. Collective."""
        for line in listed(self.bad_samples.record(new, step)):
            if self.world.is_first:
                Progress.write(line)
        self.check_bad_samples(self.bad_samples)

    def check_bad_samples(self, log: BadSampleLog) -> None:
        """End the run if too many are listed. Collective."""
        try:
            log.check()
        except DataError as error:
            self.end_with(error)

    def _pass_over(self, step: int) -> None:
        """A step of which no sample can be used, on no rank: nothing is computed or updated."""
        self.empty_steps += 1
        self.rates = {}
        # As a checkpoint would restore them.
        self.engine.global_steps += self.updates_per_batch
        self.engine.skipped_steps += self.updates_per_batch
        if self.world.is_first:
            Progress.write(f"step {step} is left out: none of its samples can be used")

    def first_step(self) -> int:
        """Take the first of the next steps that is not empty; valid tokens of this rank."""
        step, empty = self.step + 1, self.empty_steps
        while True:
            tokens = self.train_step(step, next(self.steps), collect=True)
            if self.empty_steps == empty:
                return tokens
            step, empty = step + 1, self.empty_steps

    def refuse_bad_losses(self) -> float:
        """After steps that were collected: their loss, or DataError if any was not finite."""
        values = self.stats.reduced(sum_over_ranks, self.world.device)
        losses = {name: float(v) for name, v in values.items() if name.startswith("loss/")}
        bad = [f"{name}={value}" for name, value in losses.items() if not math.isfinite(value)]
        if bad or self.newly_skipped:
            raise DataError(
                f"the step was {'skipped' if self.newly_skipped else 'taken'}: "
                f"{', '.join(bad) or 'its gradient'} is not finite (NaN or Inf); look at the first "
                "samples, and try model.dtype=float32"
            )
        return losses["loss/total"]

    def _collect(self, parts: dict[str, Tensor], batch: Batch, update: int) -> None:
        if (found_S2 := parts.pop("by_source_S2", None)) is not None:
            self.by_source.add(self.stats, batch, found_S2, is_first=update == 0)
        # All ranks add all names; loss, lm and distill are 0 where there is nothing.
        groups, tokens = batch.groups_with_tokens(self.num_groups), int(batch.is_valid_BS.sum())
        counts = {
            name: tokens if term.over_tokens else groups
            for name, term in self.model.ctx.mean_losses().items()
        }
        for name, value in parts.items():
            count = counts.get(name, 1)
            name = f"loss/{name}" if name != "loss" else "loss/total"
            self.stats.add(name, Stat(value * count, count=float(count)))
        self.stats.add_layers(self.model.ctx)

    def _metrics(self) -> dict[str, float | Tensor]:
        """Of the step that was collected and the time since the last ones, of all ranks together.
        Collective."""
        is_warm = self.is_warm or len(self.timed) == 1  # one step must do, if there is no other
        tokens, seconds = zip(*self.timed[not is_warm :], strict=True)
        self.stats.add("throughput/tokens", Stat(torch.tensor(sum(tokens)), "sum"))
        summed = self.stats.reduced(sum_over_ranks, self.world.device)
        total = summed.pop("throughput/tokens").item()
        values = metrics.derived(summed)
        values["throughput/tokens_per_second"] = total / sum(seconds)
        values["throughput/seconds"] = sum(spent for _, spent in self.timed)
        values["throughput/checkpoint_stall_seconds"] = self.stalled
        self.timed, self.is_warm = [], True
        values |= {f"lr/{title}": rate for title, rate in self.rates.items()}
        values["skipped_steps"] = self.skipped
        values["empty_steps"] = self.empty_steps
        values["data/bad_samples"] = len(self.bad_samples)
        norm = self.engine.get_global_grad_norm()
        if norm is not None and self.rates:  # not in a step that was left out
            values["grad_norm"] = float(norm)
        return values


def micro_batch_seed(seed: int, block: int) -> int:
    """The random state of a micro-batch, from its number in the run and nothing else.

    So nothing needs to be stored, and a run that goes on with another number of ranks draws the
    numbers that it would have drawn.
    """
    state: int = np.random.SeedSequence([seed, block]).generate_state(1, np.uint64).item()
    return state
