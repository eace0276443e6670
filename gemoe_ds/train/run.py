"""One training run from its configuration: build everything, resume if asked, train, save."""

from __future__ import annotations

from pathlib import Path

import torch

from gemoe_ds.backbones.backbone import Backbone
from gemoe_ds.backbones.model import ExpertShard, MoEModel
from gemoe_ds.backbones.tokenizer import load_tokenizer
from gemoe_ds.config import RunConfig
from gemoe_ds.data.collate import Collator
from gemoe_ds.data.dataset import TrainStream
from gemoe_ds.data.sample import SampleFolder, open_samples
from gemoe_ds.engine import checkpoint
from gemoe_ds.engine.build import Engine, group_summary, initialize
from gemoe_ds.engine.distributed import World, distributed
from gemoe_ds.engine.groups import expert_shard
from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import Router
from gemoe_ds.train.monitor import Monitor
from gemoe_ds.train.trainer import Trainer

HF_FOLDER = "hf"  # where a run that trains everything leaves a Hugging Face model


def train(config: RunConfig, *, dry_run: bool = False) -> None:
    """Run `config`; with `dry_run` build everything, take one step and write nothing."""
    with distributed() as world:
        torch.manual_seed(config.seed)
        samples = open_samples(config.data.train)
        model = build_model(config, expert_shard(config.parallel.ep_size, world))
        say(
            world,
            f"{len(model.moe_layers)} MoE layers of backbone {model.backbone.name!r} converted",
        )

        # Find out about a wrong checkpoint before anything is built or written.
        identity = checkpoint.run_identity(
            config, world.size, samples.fingerprint, _base_checksum(config)
        )
        output = Path(config.output_dir)
        found, skipped = checkpoint.find(config.resume, output, identity)
        for reason in skipped:
            say(world, f"skipped: {reason}")
        if found is None and any((output / "checkpoints").glob("step-*")):
            raise ConfigError(
                f"output_dir={output} already holds a run; continue it with resume=auto, "
                "or choose another folder"
            )
        start_step = found.step if found else 0
        if start_step >= config.train.steps:
            say(world, f"already finished: {found.folder if found else ''}")
            return

        engine = initialize(model, config, world)
        say(world, group_summary(model, config.optim))
        if found:
            checkpoint.restore(engine, model, found)
            say(world, f"resumed from {found.folder}")
        stream = _stream(config, samples, model, world, start_step)

        if dry_run:
            trainer = Trainer(config, model, engine, stream, world, None, lambda step: None)
            tokens = trainer.train_step(next(stream), collect=False)
            say(
                world, f"dry run: one step of {tokens} tokens on this rank is fine; nothing written"
            )
            return

        monitor = None
        if world.is_first:
            output.mkdir(parents=True, exist_ok=True)
            (output / "config.yaml").write_text(config.dump_yaml())
            monitor = Monitor(output, start_step, config.monitor.tensorboard)

        def save(step: int) -> None:
            folder = checkpoint.save(
                engine, model, output, step, identity, world, config.checkpoint.keep
            )
            say(world, f"saved {folder}")

        try:
            Trainer(config, model, engine, stream, world, monitor, save, start_step).run()
        finally:
            if monitor:
                monitor.close()
        if config.model.train == "all":
            _save_pretrained(config, model, engine, world, output / HF_FOLDER)


def build_model(config: RunConfig, shard: ExpertShard) -> MoEModel:
    """The converted model that a configuration describes, experts of this shard only."""
    backbone = config.model.backbone
    router = config.model.router
    return MoEModel(
        Backbone.named(backbone.name)(backbone.config),
        Path(config.model.checkpoint) if config.model.checkpoint else None,
        Path(config.data.tokenizer),
        (Router.named(router.name), router.config),
        train=config.model.train,
        dtype=getattr(torch, config.model.dtype),
        shard=shard,
        recompute=config.model.recompute,
    )


def build_collator(config: RunConfig, model: MoEModel) -> Collator:
    """The collator that fits a model's image layout and a configuration's tokenizer."""
    return Collator(
        load_tokenizer(Path(config.data.tokenizer)),
        image_size=model.image.size,
        image_tokens=model.image.tokens,
        image_token_id=model.image.token_id,
        max_length=config.data.max_length,
    )


def say(world: World, text: str) -> None:
    """Print on the first rank only."""
    if world.is_first:
        print(text, flush=True)


def _base_checksum(config: RunConfig) -> str:
    checkpoint_dir = config.model.checkpoint
    return checkpoint.checksum_folder(Path(checkpoint_dir) if checkpoint_dir else None)


def _stream(
    config: RunConfig, samples: SampleFolder, model: MoEModel, world: World, start_step: int
) -> TrainStream:
    return TrainStream(
        samples,
        build_collator(config, model),
        seed=config.seed,
        micro_batch=config.train.micro_batch,
        accumulation=config.train.accumulation,
        rank=world.rank,
        world=world.size,
        threads=config.data.threads,
        start_step=start_step,
    )


def _save_pretrained(
    config: RunConfig, model: MoEModel, engine: Engine, world: World, folder: Path
) -> None:
    if world.is_first:
        state = {name: p.detach().cpu() for name, p in model.hf.named_parameters()}
        model.backbone.save_pretrained(model.hf, state, folder)
        say(world, f"saved {folder} as a Hugging Face model")
