"""One training run from its configuration: build everything, resume if asked, train, save."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from gemoe_ds.checkpoint import manifest, state
from gemoe_ds.checkpoint.identity import check_identity, run_identity
from gemoe_ds.checkpoint.manifest import Checkpoint
from gemoe_ds.checkpoint.writer import Saver
from gemoe_ds.cluster.signals import stop_together
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.cluster.watchdog import watched
from gemoe_ds.config import RunConfig
from gemoe_ds.config.paths import inputs
from gemoe_ds.data.mixture import open_training
from gemoe_ds.data.stream import TrainStream
from gemoe_ds.engine.build import group_summary, initialize
from gemoe_ds.engine.malloc import give_back_freed_memory
from gemoe_ds.engine.read_once import sha256_over_ranks
from gemoe_ds.engine.world import World, broadcast_from_first, distributed, gather_objects
from gemoe_ds.engine.zero import Engine
from gemoe_ds.errors import CheckpointError, ConfigError, writing_to
from gemoe_ds.hf_io.companions import index_files
from gemoe_ds.hf_io.rewriter import DISK_ERRORS
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.train.assemble import build_collator, build_model, collator_of, named_backbone
from gemoe_ds.train.checks.base_loss_check import base_loss_check
from gemoe_ds.train.checks.checkpoint_report import checkpoint_report
from gemoe_ds.train.early_stop import best_of, early_stops
from gemoe_ds.train.first_sample import first_sample
from gemoe_ds.train.hooks import Hook
from gemoe_ds.train.metric_writers import MetricsLog, MetricWriter, open_writers
from gemoe_ds.train.own_folder import own_folder
from gemoe_ds.train.prepare import BEFORE, Prepared, prepare, say
from gemoe_ds.train.profiling import forget_peak
from gemoe_ds.train.recipe_changes import changes, described, keep_recipes
from gemoe_ds.train.sample_log import SampleLog, adopt_old_name, forget_after
from gemoe_ds.train.saving import Saving
from gemoe_ds.train.trainer import Trainer
from gemoe_ds.train.untouched import not_compared

_LOOK = "unmodified model"
HF_FOLDER = "hf"  # where a run that trains everything leaves a Hugging Face model


def train(
    config: RunConfig,
    *,
    dry_run: bool = False,
    stop: StopRequest | None = None,
    hooks: Sequence[Hook] = (),
) -> Path | None:
    """Run `config` to its end; the folder of its newest checkpoint.

    With `dry_run` build everything, take one step and write nothing: None. `hooks` join those of
    the recipe. Raises Stopped on all ranks, with the step saved, once `stop` was set on any.
    """
    with ExitStack() as stack:
        world = stack.enter_context(distributed())
        if not dry_run:  # which may take minutes, more than a watched step
            stack.enter_context(own_folder(Path(config.output_dir), world))
        stack.enter_context(watched(world, config.monitor.stall_seconds))
        samples = open_training(config.data.train_path)
        # Another run's folder is refused before anything is measured, loaded or written.
        unread = dict.fromkeys(_model_folders(config))
        identity = run_identity(config, world.size, samples.fingerprint, unread)
        checkpoint = _checkpoint_to_resume(config, Path(config.output_dir), identity, world)
        if checkpoint and _is_finished(config, checkpoint, world):
            return checkpoint.folder
        run = prepare(config, samples, world, stop or StopRequest(), hooks, may_write=not dry_run)
        config = run.config  # which knows what train.epochs comes to
        if checkpoint and _is_finished(config, checkpoint, world):
            return checkpoint.folder
        identity |= _checksums(config, world)
        if checkpoint:
            check_identity(checkpoint.folder, checkpoint.manifest["identity"], identity)
        if dry_run:
            _look_first(run)
        model = build(run)
        if dry_run and config.model.checkpoint:
            with run.timer(_LOOK):
                for line in base_loss_check(model, config, run.samples, world):
                    say(world, line)
            give_back_freed_memory()
            forget_peak(world.device)  # a run does not look at it
        engine = resume(run, model, checkpoint, may_write=not dry_run)
        stream = _stream(run, model, checkpoint.step if checkpoint else 0)
        if dry_run:
            take_dry_step(
                run, Trainer(config, model, engine, stream, world, **_common(run, checkpoint))
            )
            return None
        return fit(run, model, engine, stream, identity, checkpoint)


def check(config: RunConfig) -> None:
    """What a run checks before it loads anything, and nothing else."""
    with distributed() as world, watched(world, config.monitor.stall_seconds):
        prepare(config, open_training(config.data.train_path), world, StopRequest())


def _is_finished(config: RunConfig, checkpoint: Checkpoint, world: World) -> bool:
    if config.known_steps is None or checkpoint.step < config.known_steps:
        return False
    say(world, f"already finished: {checkpoint.folder}")
    return True


def build(run: Prepared) -> MoEModel:
    """The model, converted, with the weights of its base. Collective."""
    with run.timer("loading"):
        model = build_model(run.config, run.shard, run.memory, show_progress=run.world.is_first)
    stop_together(run.stop, run.world, BEFORE)
    name = model.backbone.name
    say(run.world, f"{len(model.moe_layers)} MoE layers of backbone {name!r} converted")
    return model


def resume(
    run: Prepared, model: MoEModel, checkpoint: Checkpoint | None, *, may_write: bool = True
) -> Engine:
    """The engine, with what the checkpoint holds if there is one. Collective."""
    config, world = run.config, run.world
    if checkpoint:
        state.load_trained_weights(model, checkpoint.folder, world)
    with run.timer("engine"):
        engine = initialize(model, config, world, may_write=may_write)
        if checkpoint:
            state.load_optimizer_state(engine, model, checkpoint, world)
    stop_together(run.stop, world, BEFORE)
    say(world, group_summary(model, config.optim))
    if checkpoint:
        since = changes(checkpoint, config, world.size)
        say(world, "\n".join(filter(None, [f"resumed from {checkpoint.folder}", since])))
    return engine


def take_dry_step(run: Prepared, trainer: Trainer) -> None:
    """One step of the run, of which nothing is written. Collective."""
    with run.timer("one step"):
        tokens = trainer.first_step()
    loss = trainer.refuse_bad_losses()
    say(
        run.world,
        f"dry run: one step of {tokens} tokens on this rank is fine, loss {loss:.4g}; "
        "nothing written",
    )
    peak = run.timer.peak(run.expected.on_gpu, without=_LOOK)
    say(run.world, run.expected.against(peak))


def fit(
    run: Prepared,
    model: MoEModel,
    engine: Engine,
    stream: TrainStream,
    identity: dict[str, Any],
    checkpoint: Checkpoint | None,
) -> Path | None:
    """Train, and write what the run leaves behind; its newest checkpoint. Collective."""
    config, world, output = run.config, run.world, run.output
    start_step = checkpoint.step if checkpoint else 0
    with writing_to(output):
        writers = _open_output(config, output, start_step) if world.is_first else []
        run.bad_samples.keep_in(output if world.is_first else None, start_step)
        run.bad_samples.check()
        gather_objects(None)  # the folder is as the run goes on from it
        forget_after(output, start_step, (world.rank, world.size))
        logs = [SampleLog(output, world.rank)] if config.monitor.sample_log else []
    saver = _saver(run, model, engine, identity)
    best = best_of(config, run.hooks) if config.checkpoint.keep_best else None
    saving = Saving(saver, config.checkpoint.every, best)
    stops = early_stops(config, run.hooks)
    hooks = [*logs, *run.hooks, *stops, MetricsLog(writers), saving]
    trainer = Trainer(config, model, engine, stream, world, hooks, **_common(run, checkpoint))
    try:
        with run.timer("training"):
            trainer.run()
        with run.timer("last save"):
            trainer.finish()
    except BaseException:
        saver.finish_alone()
        with suppress(OSError):  # of which a full disk has been said already
            _close(*writers, *logs)
        raise
    finally:
        stream.close()
    with writing_to(output):
        _close(*writers, *logs)
        if world.is_first:
            run.timer.write(output)
    if trainer.end_reason and trainer.step < config.num_steps:
        say(world, f"ended early, after step {trainer.step}: {trainer.end_reason}")
    if line := not_compared(config):
        say(world, line)
    last = saver.last or (checkpoint.folder if checkpoint else None)
    say(world, f"saved {last}" if last else "nothing to save")
    if config.model.trainable == "all" and saver.last:
        base = Path(config.model.checkpoint) if config.model.checkpoint else None
        _save_pretrained(model, saver.last, base, world, output / HF_FOLDER)
    return last


def _common(run: Prepared, checkpoint: Checkpoint | None) -> dict[str, Any]:
    return {
        "resumed": checkpoint,
        "stop": run.stop,
        "bad_samples": run.bad_samples,
        "sources": run.sources,
    }


def _saver(run: Prepared, model: MoEModel, engine: Engine, identity: dict[str, Any]) -> Saver:
    config, world = run.config, run.world
    extra = {
        "recipe": described(config),
        "base": {"path": config.model.checkpoint, "sha256": identity["base checkpoint"]},
        "written by": {
            "ranks": world.size,
            "ep_size": config.ep_size,
            "zero_stage": config.zero_stage,
        },
    }
    keep = config.checkpoint.keep
    return Saver(engine, model, run.output, identity, world, keep=keep, extra=extra)


def _checkpoint_to_resume(
    config: RunConfig, output: Path, identity: dict[str, Any], world: World
) -> Checkpoint | None:
    """The verified checkpoint that `config.resume` means; None to start anew. Collective."""
    checkpoint, skipped = state.find_together(config.resume, output, identity, world)
    for reason in skipped:
        say(world, f"skipped: {reason}")
    if checkpoint is None and config.start_from is not None:
        checkpoint, _ = state.find_together(config.start_from, output, identity, world)
    is_own = checkpoint is not None and manifest.is_of(checkpoint.folder, output)
    if not is_own and gather_objects(bool(manifest.candidates(output)))[0]:
        raise ConfigError(
            f"output_dir={output} already holds a run; continue it with resume=auto, "
            "or choose another folder"
        )
    return checkpoint


def _open_output(config: RunConfig, output: Path, start_step: int) -> list[MetricWriter]:
    """The output folder as the run goes on from `start_step`; the first rank does it."""
    output.mkdir(parents=True, exist_ok=True)
    keep_recipes(output, config, start_step)
    manifest.clean(output)
    for folder in manifest.set_aside(output, start_step):
        print(f"set aside: {folder}, from after step {start_step}", flush=True)
    adopt_old_name(output)
    return open_writers(config, output, start_step)


def _close(*files: MetricWriter | SampleLog) -> None:
    for file in files:
        file.close()


def _look_first(run: Prepared) -> None:
    """Say what can be known of the user's files before anything is loaded."""
    config = run.config
    base = Path(config.model.checkpoint) if config.model.checkpoint else None
    backbone = named_backbone(config)
    hf = backbone.load(base, Path(config.data.tokenizer))
    collator = collator_of(config, backbone, hf)
    if run.world.is_first:
        for line in checkpoint_report(backbone, hf, base, collator):
            print(line, flush=True)
        for line in first_sample(collator, run.samples):
            print(line, flush=True)
        print(run.expected, flush=True)


def _model_folders(config: RunConfig) -> dict[str, Path | None]:
    """What a run starts from, by its name in `run_identity`."""
    base, towers = config.model.checkpoint, inputs(config.model.backbone, "model.backbone.")
    return {"base checkpoint": Path(base) if base else None} | {k: Path(p) for k, p, _ in towers}


def _checksums(config: RunConfig, world: World) -> dict[str, str]:
    """Of those folders. Collective."""
    folders = {key: folder for key, folder in _model_folders(config).items() if folder}
    files = broadcast_from_first(
        lambda: {key: manifest.files_of(folder) for key, folder in folders.items()}, world
    )
    found = sha256_over_ranks({path for paths in files.values() for path in paths}, world)
    return {"base checkpoint": "none"} | {
        key: manifest.combined_checksum(folder, {path: found[path] for path in files[key]})
        for key, folder in folders.items()
    }


def _stream(run: Prepared, model: MoEModel, start_step: int) -> TrainStream:
    config, world = run.config, run.world
    return TrainStream(
        run.samples,
        build_collator(config, model),
        seed=config.seed,
        micro_batch_size=config.train.micro_batch_size,
        accumulation=config.accumulation_steps(world.size),
        rank=world.rank,
        world=world.size,
        num_workers=config.data.num_workers,
        start_step=start_step,
        pinned=world.device.type == "cuda",
        selection=run.selection,
        prefetch_bytes=config.data.prefetch_bytes,
        expected_bytes=run.expected.largest_batch,
    )


def _save_pretrained(
    model: MoEModel, checkpoint_dir: Path, base: Path | None, world: World, folder: Path
) -> None:
    """From the checkpoint, which is whole whatever the ranks and the ZeRO stage were; in the layout
    of `base`, where there is one. Collective: each rank writes some of the files."""
    tensors = model.stock_tensors(state.load_trained(checkpoint_dir))
    problem = None
    try:
        model.backbone.save_trained(model.hf, tensors, base, folder, (world.rank, world.size))
    except DISK_ERRORS as error:
        problem = str(error)
    for rank, said in enumerate(gather_objects(problem)):
        if said:
            raise CheckpointError(f"{folder}: rank {rank} cannot write its part of it: {said}")
    if world.is_first:
        index_files(folder)
    say(world, f"saved {folder} as a Hugging Face model")
