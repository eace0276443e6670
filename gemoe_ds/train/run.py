"""One training run from its configuration: build everything, resume if asked, train, save."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from gemoe_ds.checkpoint import manifest, state
from gemoe_ds.checkpoint.manifest import Checkpoint
from gemoe_ds.checkpoint.writer import Saver
from gemoe_ds.cluster.preflight import preflight
from gemoe_ds.cluster.signals import stop_together
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.cluster.watchdog import watched
from gemoe_ds.config import RunConfig
from gemoe_ds.config.deepspeed import check_deepspeed, summary
from gemoe_ds.config.paths import inputs
from gemoe_ds.data.bad_samples import BadSampleLog
from gemoe_ds.data.sample import SampleFolder, open_samples
from gemoe_ds.data.stream import TrainStream
from gemoe_ds.engine.build import group_summary, initialize
from gemoe_ds.engine.groups import expert_shard
from gemoe_ds.engine.host_memory import host_memory
from gemoe_ds.engine.malloc import give_back_freed_memory
from gemoe_ds.engine.world import World, broadcast_from_first, distributed, gather_objects
from gemoe_ds.errors import ConfigError, writing_to
from gemoe_ds.hf_io.allocator import WeightAllocator
from gemoe_ds.models.moe_model import ExpertShard, MoEModel
from gemoe_ds.train.assemble import (
    build_collator,
    build_model,
    collator_of,
    meta_collator,
    named_backbone,
)
from gemoe_ds.train.checks.base_loss_check import base_loss_check
from gemoe_ds.train.checks.checkpoint_report import checkpoint_report
from gemoe_ds.train.checks.samples import check_samples
from gemoe_ds.train.estimate import Estimate, estimate
from gemoe_ds.train.first_sample import first_sample
from gemoe_ds.train.monitor import Monitor
from gemoe_ds.train.profiling import PhaseTimer, forget_peak, resident_memory
from gemoe_ds.train.recipe_changes import changes, described, keep_recipes
from gemoe_ds.train.sample_log import SampleLog, forget_after
from gemoe_ds.train.trainer import Trainer

BEFORE = "before the first step; resume=auto goes on"
_LOOK = "unmodified model"
HF_FOLDER = "hf"  # where a run that trains everything leaves a Hugging Face model


def train(config: RunConfig, *, dry_run: bool = False, stop: StopRequest | None = None) -> None:
    """Run `config`; with `dry_run` build everything, take one step and write nothing.

    Raises Stopped on all ranks, with the step saved, once `stop` was set on any.
    """
    stop = stop or StopRequest()
    with distributed() as world, watched(world, config.monitor.stall_seconds):
        samples = open_samples(config.data.train_path)
        # Another run's folder is refused before anything is measured, loaded or written.
        output = Path(config.output_dir)
        unread = dict.fromkeys(_model_folders(config))
        identity = state.run_identity(config, world.size, samples.fingerprint, unread)
        found = _checkpoint_to_resume(config, output, identity, world)
        start_step = found.step if found else 0
        if found and start_step >= config.train.steps:
            say(world, f"already finished: {found.folder}")
            return
        shard, memory, expected, bad_samples = check_run(
            config, samples, world, stop, may_write=not dry_run
        )
        identity |= _checksums(config, world)
        if found:
            manifest.check_identity(found, identity)
        timer = PhaseTimer(world)
        if dry_run:
            _look_first(config, samples, world)
            say(world, str(expected))
        with timer("loading"):
            model = build_model(config, shard, memory, show_progress=world.is_first)
        stop_together(stop, world, BEFORE)
        say(
            world,
            f"{len(model.moe_layers)} MoE layers of backbone {model.backbone.name!r} converted",
        )
        if dry_run and config.model.checkpoint:
            with timer(_LOOK):
                for line in base_loss_check(model, config, samples, world):
                    say(world, line)
            give_back_freed_memory()
            forget_peak(world.device)  # a run does not look at it

        if found:
            state.load_trained_weights(model, found.folder)

        with timer("engine"):
            engine = initialize(model, config, world)
            if found:
                state.load_optimizer_state(engine, model, found)
        stop_together(stop, world, BEFORE)
        say(world, group_summary(model, config.optim))
        if found:
            since = changes(found, config, world.size)
            say(world, "\n".join(filter(None, [f"resumed from {found.folder}", since])))
        stream = _stream(config, samples, model, world, start_step)

        if dry_run:
            trainer = Trainer(
                config, model, engine, stream, world, None, None, stop=stop, bad_samples=bad_samples
            )
            with timer("one step"):
                tokens = trainer.first_step(start_step + 1)
            loss = trainer.refuse_bad_losses()
            say(
                world,
                f"dry run: one step of {tokens} tokens on this rank is fine, loss {loss:.4g}; "
                "nothing written",
            )
            say(world, expected.against(timer.peak(expected.on_gpu, without=_LOOK)))
            return

        with writing_to(output):
            monitor = _prepare(config, output, start_step) if world.is_first else None
            bad_samples.keep_in(output if world.is_first else None, start_step)
            bad_samples.check()
            gather_objects(None)  # the sample log's files stay as they are from here on
            sample_log = SampleLog(output, world.rank) if config.monitor.sample_log else None
        saver = Saver(
            engine,
            model,
            output,
            identity,
            world,
            keep=config.checkpoint.keep,
            extra={
                "recipe": described(config),
                "base": {"path": config.model.checkpoint, "sha256": identity["base checkpoint"]},
                "written by": {
                    "ranks": world.size,
                    "ep_size": config.parallel.ep_size,
                    "zero_stage": config.zero_stage,
                },
            },
        )
        try:
            with timer("training"):
                Trainer(
                    config,
                    model,
                    engine,
                    stream,
                    world,
                    monitor,
                    saver,
                    start_step=start_step,
                    updates=found.updates if found else 0,
                    empty_steps=found.empty_steps if found else 0,
                    sample_log=sample_log,
                    stop=stop,
                    bad_samples=bad_samples,
                ).run()
        except BaseException:
            saver.finish_alone()
            with suppress(OSError):  # of which a full disk has been said already
                _close(monitor, sample_log)
            raise
        with timer("last save"):
            last = saver.wait()
        assert last is not None, "the trainer saves its last step"
        with writing_to(output):
            _close(monitor, sample_log)
            if world.is_first:
                timer.write(output)
        say(world, f"saved {last}")
        if config.model.trainable == "all":
            base = Path(config.model.checkpoint) if config.model.checkpoint else None
            _save_pretrained(model, last, base, world, output / HF_FOLDER)


def check(config: RunConfig) -> None:
    """What a run checks before it loads anything, and nothing else."""
    with distributed() as world, watched(world, config.monitor.stall_seconds):
        check_run(config, open_samples(config.data.train_path), world, StopRequest())


def check_run(
    config: RunConfig,
    samples: SampleFolder,
    world: World,
    stop: StopRequest,
    *,
    may_write: bool = False,
) -> tuple[ExpertShard, WeightAllocator, Estimate, BadSampleLog]:
    """Refuse data, hosts and ranks that are not fit for this run; else what this rank's experts
    are, where its other weights are kept, how much memory it is thought to need, and the samples
    that are left out. `may_write`: into the run's folder. Collective."""
    lengths, bad_samples = check_samples(
        config, samples, meta_collator(config), world, stop, may_write=may_write
    )
    stop_together(stop, world, BEFORE)
    trainable = config.model.trainable != "routers"
    shard = expert_shard(config.parallel.ep_size, world, trainable=trainable)
    memory = host_memory(world)
    expected = broadcast_from_first(
        lambda: estimate(config, samples, world.size, world.device, lengths), world
    )
    has = resident_memory() if world.device.type == "cpu" else 0  # this process, already
    needed = expected.total - has - expected.common * (memory.num_ranks - 1) // memory.num_ranks
    needed = max(gather_objects(needed))  # so that all ranks come to one verdict
    on_disk = expected.checkpoint * (config.checkpoint.keep + 1)
    for line in check_deepspeed(config, world.size):
        say(world, line)
    say(world, summary(config, world.size, expected.hidden_size))
    ep_size, output = config.parallel.ep_size, Path(config.output_dir)
    for line in preflight(world, output, ep_size, needed, shard.groups, on_disk):
        say(world, line)
    return shard, memory, expected, bad_samples


def _checkpoint_to_resume(
    config: RunConfig, output: Path, identity: dict[str, Any], world: World
) -> Checkpoint | None:
    """The verified checkpoint that `config.resume` means; None to start anew. Collective."""
    found, skipped = state.find_together(config.resume, output, identity, world)
    for reason in skipped:
        say(world, f"skipped: {reason}")
    if found is None and gather_objects(bool(manifest.candidates(output)))[0]:
        raise ConfigError(
            f"output_dir={output} already holds a run; continue it with resume=auto, "
            "or choose another folder"
        )
    return found


def _prepare(config: RunConfig, output: Path, start_step: int) -> Monitor:
    """The output folder as the run goes on from `start_step`; the first rank does it."""
    output.mkdir(parents=True, exist_ok=True)
    keep_recipes(output, config, start_step)
    manifest.clean(output)
    for folder in manifest.set_aside(output, start_step):
        print(f"set aside: {folder}, from after step {start_step}", flush=True)
    forget_after(output, start_step)
    return Monitor(output, start_step, config.monitor.tensorboard)


def _close(*files: Monitor | SampleLog | None) -> None:
    for file in files:
        if file:
            file.close()


def _look_first(config: RunConfig, samples: SampleFolder, world: World) -> None:
    """Say what can be known of the user's files before anything is loaded."""
    checkpoint_dir = config.model.checkpoint
    backbone, checkpoint_path = named_backbone(config), checkpoint_dir and Path(checkpoint_dir)
    hf = backbone.load(checkpoint_path or None, Path(config.data.tokenizer))
    collator = collator_of(config, backbone, hf)
    if world.is_first:
        for line in checkpoint_report(backbone, hf, checkpoint_path or None, collator):
            print(line, flush=True)
        for line in first_sample(collator, samples):
            print(line, flush=True)


def say(world: World, text: str) -> None:
    """Print on the first rank only."""
    if world.is_first:
        print(text, flush=True)


def _model_folders(config: RunConfig) -> dict[str, Path | None]:
    """What a run starts from, by its name in `run_identity`."""
    base, towers = config.model.checkpoint, inputs(config.model.backbone, "model.backbone.")
    return {"base checkpoint": Path(base) if base else None} | {k: Path(p) for k, p, _ in towers}


def _checksums(config: RunConfig, world: World) -> dict[str, str]:
    """Of those folders. Collective."""
    return broadcast_from_first(
        lambda: {k: manifest.checksum_folder(p) for k, p in _model_folders(config).items()}, world
    )


def _stream(
    config: RunConfig,
    samples: SampleFolder,
    model: MoEModel,
    world: World,
    start_step: int,
) -> TrainStream:
    return TrainStream(
        samples,
        build_collator(config, model),
        seed=config.seed,
        micro_batch_size=config.train.micro_batch_size,
        accumulation=config.accumulation_steps(world.size),
        rank=world.rank,
        world=world.size,
        num_workers=config.data.num_workers,
        start_step=start_step,
    )


def _save_pretrained(
    model: MoEModel, checkpoint_dir: Path, base: Path | None, world: World, folder: Path
) -> None:
    """From the checkpoint, which is whole whatever the ranks and the ZeRO stage were; in the layout
    of `base`, where there is one."""
    if world.is_first:
        tensors = model.stock_tensors(state.load_trained(checkpoint_dir))
        model.backbone.save_trained(model.hf, tensors, base, folder)
        say(world, f"saved {folder} as a Hugging Face model")
