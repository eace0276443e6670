"""The evaluation of a model as training left it, against that of its checkpoint in a fresh one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gemoe_ds.data.sample import open_samples
from gemoe_ds.data.stream import EvalStream
from gemoe_ds.evaluation.score import Scores, evaluate
from tests.train.resuming import one_group

BATCH = 3  # samples


@dataclass(frozen=True)
class Reloaded:
    """Of one run: what it scores, and which of its parameters stand where they began."""

    trained: Scores
    reloaded: Scores
    fresh: Scores  # before training: says whether the two above say anything
    still: list[str]
    not_finite: list[str]


def train_and_reload(rank: int, configs: list, others: Sequence = ()) -> list[Reloaded]:
    """Train every configuration; score the model itself, and then its checkpoint.

    `others` are trained after them, and no more: a new process group takes seconds.
    """
    import gemoe_ds.train.run as module

    models = []
    original = module.build_model

    def build_model(*args, **kwargs):
        models.append(original(*args, **kwargs))
        return models[-1]

    module.build_model = build_model
    try:
        with one_group(module):
            found = [_train_and_reload(module, config, models) for config in configs]
            for config in others:
                module.train(config)
            return found
    finally:
        module.build_model = original


def _train_and_reload(module, config, models: list) -> Reloaded:
    from gemoe_ds.checkpoint.manifest import newest
    from gemoe_ds.checkpoint.state import load_trained_weights
    from gemoe_ds.engine.groups import expert_shard

    module.train(config)
    with module.distributed() as world:
        trainable = config.model.trainable != "routers"
        shard = expert_shard(config.ep_size, world, trainable=trainable)
        trained = _score(models.pop(), config, world)
        fresh = module.build_model(config, shard)
        # of another seed: nothing that the routers drew may be missing from a checkpoint
        other = config.model_copy(update={"seed": config.seed + 1})
        reloaded = module.build_model(other, shard)
        models.clear()
        load_trained_weights(reloaded, newest(Path(config.output_dir)))
        before, after = fresh.trainable(), reloaded.trainable()
        return Reloaded(
            trained,
            _score(reloaded, config, world),
            _score(fresh, config, world),
            still=[n for n, p in after.items() if torch.equal(p, before[n])],
            not_finite=[n for n, p in after.items() if not torch.isfinite(p).all()],
        )


def _score(model, config, world) -> Scores:
    from gemoe_ds.engine.world import ALL_RANKS
    from gemoe_ds.train.assemble import build_collator

    samples = open_samples(config.data.train_path)
    stream = EvalStream(
        samples, build_collator(config, model), batch=BATCH, rank=world.rank, world=world.size
    )
    return evaluate(model, samples, stream, world.device, ALL_RANKS)


def is_same_evaluation(found: Reloaded) -> None:
    """Accuracy, k of every token in every layer, and entropies to the bit."""
    one, other = found.trained, found.reloaded
    assert one.accuracy_by_kind == other.accuracy_by_kind and one.accuracy == other.accuracy
    for name, array in vars(one.routing).items():
        assert np.array_equal(array, getattr(other.routing, name)), name
    fresh = found.fresh.routing.entropy_LN
    assert not np.array_equal(one.routing.entropy_LN, fresh), "it has not trained"
