"""Whatever of a run can be looked at before anything is loaded, on all of its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemoe_ds.cluster.preflight import preflight
from gemoe_ds.cluster.signals import stop_together
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.config import RunConfig
from gemoe_ds.config.deepspeed import check_deepspeed, summary
from gemoe_ds.data.bad_samples import BadSampleLog
from gemoe_ds.data.collate import Collator
from gemoe_ds.data.holdout import held_out
from gemoe_ds.data.mixture import SampleList
from gemoe_ds.data.order import Selection
from gemoe_ds.data.row_names import Sources
from gemoe_ds.engine.compile import check_compiler
from gemoe_ds.engine.gpu import check_dtype
from gemoe_ds.engine.groups import expert_shard
from gemoe_ds.engine.read_once import weight_memory
from gemoe_ds.engine.world import World, broadcast_from_first, gather_objects
from gemoe_ds.errors import ConfigError
from gemoe_ds.hf_io.allocator import WeightAllocator
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.train.assemble import meta_collator
from gemoe_ds.train.checks.samples import Checked, check_samples
from gemoe_ds.train.checks.selection import with_epochs_counted
from gemoe_ds.train.early_stop import best_of
from gemoe_ds.train.estimate import Estimate, estimate
from gemoe_ds.train.hooks import Hook, load_hooks
from gemoe_ds.train.layout import still_needed, with_ep_size
from gemoe_ds.train.metric_writers import check_writers
from gemoe_ds.train.profiling import PhaseTimer
from gemoe_ds.train.validation import Validation

BEFORE = "before the first step; resume=auto goes on"


@dataclass(frozen=True)
class Prepared:
    """A run that may load: all that can be known of it before is checked."""

    config: RunConfig
    world: World
    stop: StopRequest
    samples: SampleList
    bad_samples: BadSampleLog
    selection: Selection
    sources: Sources | None
    shard: ExpertShard
    memory: WeightAllocator  # where this rank's weights are kept, but for its experts
    expected: Estimate
    hooks: tuple[Hook, ...]  # validation, and the user's
    timer: PhaseTimer

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)


def prepare(
    config: RunConfig,
    samples: SampleList,
    world: World,
    stop: StopRequest,
    hooks: Sequence[Hook] = (),
    *,
    may_write: bool = False,
) -> Prepared:
    """Refuse hooks, data, hosts and ranks that are not fit for this run. Collective.

    `may_write`: into the run's folder.
    """
    for hook in hooks:
        if not isinstance(hook, Hook):
            raise ConfigError(f"hooks: {hook!r} is no instance of a class that extends Hook")
    check_dtype(config.model.dtype, world.device)
    if config.model.compile == "dense":
        check_compiler(world.device)
    hooks = [*load_hooks(config.train.hooks), *hooks]
    broadcast_from_first(lambda: check_writers(config), world)
    collator = meta_collator(config)
    checked = check_samples(config, samples, collator, world, stop, may_write=may_write)
    stop_together(stop, world, BEFORE)
    assert checked is not None, "nobody asked to stop"
    config = with_epochs_counted(config, checked.selection, samples, world.size)
    if config.train.eval_every:
        hooks = [_validation(config, samples, checked, collator, world, stop), *hooks]
    best_of(config, hooks)
    config, why = with_ep_size(config, samples, world, checked)
    trains = config.model.trainable != "routers"
    shard = expert_shard(config.ep_size, world, trainable=trains)
    memory = weight_memory(config, world)
    expected = broadcast_from_first(
        lambda: estimate(config, samples, world.size, world.device, checked), world
    )
    needed = still_needed(expected, memory.num_ranks, world.device)
    needed = max(gather_objects(needed))  # so that all ranks decide alike
    most = config.checkpoint.keep + 1 + bool(config.checkpoint.keep_best)
    for line in filter(None, [why, memory.note, *check_deepspeed(config, world.size)]):
        say(world, line)
    say(world, summary(config, world.size, expected.hidden_size))
    ep_size, output = config.ep_size, Path(config.output_dir)
    for line in preflight(world, output, ep_size, needed, shard.groups, most * expected.checkpoint):
        say(world, line)
    return Prepared(
        config,
        world,
        stop,
        samples,
        checked.bad_samples,
        checked.selection,
        checked.sources,
        shard,
        memory,
        expected,
        tuple(hooks),
        PhaseTimer(world),
    )


def _validation(
    config: RunConfig,
    samples: SampleList,
    checked: Checked,
    collator: Collator,
    world: World,
    stop: StopRequest,
) -> Validation:
    """On `data.validation_path`, or on what is held out. Collective."""
    row_H = checked.selection.held_out_H
    if row_H is None:
        return Validation(config, collator, world, stop)
    of_rows = checked.lengths and checked.lengths.of_rows(row_H)
    some = held_out(samples, row_H, config.data.holdout)
    return Validation(config, collator, world, stop, held_out=(some, of_rows))


def say(world: World, text: str) -> None:
    """Print on the first rank only."""
    if world.is_first:
        print(text, flush=True)
