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
from gemoe_ds.data.order import Selection
from gemoe_ds.data.sample import SampleFolder
from gemoe_ds.engine.compile import check_compiler
from gemoe_ds.engine.gpu import check_dtype
from gemoe_ds.engine.groups import expert_shard
from gemoe_ds.engine.host_memory import host_memory
from gemoe_ds.engine.world import World, broadcast_from_first, gather_objects
from gemoe_ds.errors import ConfigError
from gemoe_ds.hf_io.allocator import WeightAllocator
from gemoe_ds.models.moe_model import ExpertShard
from gemoe_ds.train.assemble import meta_collator
from gemoe_ds.train.checks.samples import check_samples, selection_of
from gemoe_ds.train.early_stop import best_of
from gemoe_ds.train.estimate import CONNECTIONS, Estimate, estimate
from gemoe_ds.train.hooks import Hook, load_hooks
from gemoe_ds.train.metric_writers import check_writers
from gemoe_ds.train.profiling import PhaseTimer, resident_memory
from gemoe_ds.train.validation import Validation

BEFORE = "before the first step; resume=auto goes on"


@dataclass(frozen=True)
class Prepared:
    """A run that may load: all that can be known of it before is checked."""

    config: RunConfig
    world: World
    stop: StopRequest
    samples: SampleFolder
    bad_samples: BadSampleLog
    selection: Selection
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
    samples: SampleFolder,
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
    lengths, bad_samples = check_samples(
        config, samples, collator, world, stop, may_write=may_write
    )
    stop_together(stop, world, BEFORE)
    selection = broadcast_from_first(lambda: selection_of(lengths, samples, config), world)
    if config.train.eval_every:
        hooks = [Validation(config, collator, world, stop), *hooks]
    best_of(config, hooks)
    trainable = config.model.trainable != "routers"
    shard = expert_shard(config.parallel.ep_size, world, trainable=trainable)
    memory = host_memory(world)
    expected = broadcast_from_first(
        lambda: estimate(config, samples, world.size, world.device, lengths), world
    )
    has = resident_memory() if world.device.type == "cpu" else 0  # this process, already
    needed = expected.total - has - expected.common * (memory.num_ranks - 1) // memory.num_ranks
    needed += expected.beside.get(CONNECTIONS, 0)
    needed = max(gather_objects(needed))  # so that all ranks come to one verdict
    most = config.checkpoint.keep + 1 + bool(config.checkpoint.keep_best)
    for line in check_deepspeed(config, world.size):
        say(world, line)
    say(world, summary(config, world.size, expected.hidden_size))
    ep_size, output = config.parallel.ep_size, Path(config.output_dir)
    for line in preflight(world, output, ep_size, needed, shard.groups, most * expected.checkpoint):
        say(world, line)
    return Prepared(
        config,
        world,
        stop,
        samples,
        bad_samples,
        selection,
        shard,
        memory,
        expected,
        tuple(hooks),
        PhaseTimer(world),
    )


def say(world: World, text: str) -> None:
    """Print on the first rank only."""
    if world.is_first:
        print(text, flush=True)
