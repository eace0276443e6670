"""Which run a checkpoint belongs to: what may not change while it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemoe_ds.config import RunConfig
from gemoe_ds.config.old_names import with_new_names
from gemoe_ds.config.paths import inputs
from gemoe_ds.errors import CheckpointError, as_written
from gemoe_ds.moe.router import Router

SAMPLES_PER_STEP = "samples per step"  # of the identity
GROUPED, TOO_LONG = "data.group_by_length", "data.too_long"  # of the identity
MIXTURE, HOLDOUT = "data.train_path's parts", "data.holdout"  # too
PACKED = "data.pack"
LOSS_BATCH, ANY = "train.auxiliary_batch_size", "any"  # too
_MICRO_BATCH = "train.micro_batch_size"  # what older checkpoints have in its place
# What older checkpoints do not name.
DEFAULTS = {GROUPED: False, TOO_LONG: "cut", MIXTURE: "one folder", HOLDOUT: 0, PACKED: False}
_CONTENTS = {
    "data": "data.train_path",
    "base checkpoint": "model.checkpoint",
}  # too, by their options


def run_identity(
    config: RunConfig, world_size: int, data_fingerprint: str, checksums: Mapping[str, str | None]
) -> dict[str, Any]:
    """What must be equal for a checkpoint to continue this run, flat: name -> value.

    `checksums`: of "base checkpoint" and of what the backbone reads beside it, whose paths do not
    count: they may be spelt in many ways. None: not read yet, and not compared.
    """
    model = config.model.model_dump(mode="json")
    model["backbone"] |= dict.fromkeys(key for key, *_ in inputs(config.model.backbone))
    identity = {f"model.{key}": model[key] for key in ("backbone", "router", "trainable", "dtype")}
    identity |= checksums
    identity["data"] = data_fingerprint
    identity["seed"] = config.seed
    identity[LOSS_BATCH] = _loss_batch(config)
    identity[SAMPLES_PER_STEP] = (
        config.train.micro_batch_size * config.accumulation_steps(world_size) * world_size
    )
    # max_length decides on what is dropped, and on the length, and so the place, of what is cut.
    at, data = f" with data.max_length={config.data.max_length}", config.data
    identity[GROUPED] = f"true in epochs{at}" if data.group_by_length else DEFAULTS[GROUPED]
    identity[PACKED] = f"true{at}" if data.pack else DEFAULTS[PACKED]
    identity[TOO_LONG] = f"drop{at}" if data.too_long == "drop" else DEFAULTS[TOO_LONG]
    identity[HOLDOUT] = data.holdout
    identity[MIXTURE] = DEFAULTS[MIXTURE]
    if not isinstance(data.train_path, str):  # names and places do not decide on the order
        identity[MIXTURE] = [
            {key: getattr(part, key) for key in ("repeat", "weight", "limit")}
            for part in data.train_path
        ]
    return identity


def check_identity(folder: Path, stored: dict[str, Any], identity: dict[str, Any]) -> None:
    """CheckpointError if the checkpoint belongs to another run; None in `identity` is not known."""
    stored = _with_loss_batch(DEFAULTS | with_new_names(stored, warn=False), identity)
    stored = _with_added_options(_with_checksums(stored, identity), identity)
    other = [k for k, v in identity.items() if v is not None and stored.get(k) != v]
    if not other:
        return
    loss_batch = other == [LOSS_BATCH]
    differing = [
        words
        for key in other
        for words in (
            [_of_losses(stored.get(key), identity[key], identity["model.router"])]
            if key == LOSS_BATCH
            else _difference(key, stored.get(key), identity[key])
        )
    ]
    way_out = "set it as it was" if len(differing) == 1 else "set them as they were"
    if loss_batch and not _bound(identity["model.router"]):
        way_out = (
            f"set {LOSS_BATCH}={stored.get(LOSS_BATCH)} and a multiple of it as {_MICRO_BATCH}"
        )
    if stored.get(SAMPLES_PER_STEP) != identity.get(SAMPLES_PER_STEP):
        way_out = f"set train.global_batch_size={stored.get(SAMPLES_PER_STEP)}"
    raise CheckpointError(
        f"{folder} belongs to another run: {'; '.join(differing)}; {way_out}, or resume=none "
        "and another output_dir to start anew"
    )


def _difference(key: str, old: Any, new: Any) -> Iterator[str]:
    """What differs in one value of an identity, option by option."""
    if key in _CONTENTS or key.startswith("model.backbone."):  # checksums, which tell nobody much
        yield f"what is in its {_CONTENTS.get(key, key)} is not what this run's holds"
        return
    pairs = {key: (old, new)}
    if isinstance(old, dict) and isinstance(new, dict):
        names = ["name"] if old.get("name") != new.get("name") else sorted(old.keys() | new.keys())
        pairs = {f"{key}.{name}": (old.get(name), new.get(name)) for name in names}
    for option, (was, now) in pairs.items():
        if was != now:
            yield f"its {option} is {as_written(was)}, this run's is {as_written(now)}"


def _loss_batch(config: RunConfig) -> int | str:
    """How many samples share what depends on which ones do; ANY, where nothing does."""
    router, options = config.model.router.router_class, config.model.router.config
    if router.bound_to_micro_batch(options) or router.shared_by_samples(options):
        return config.train.loss_batch_size
    return ANY


def _of_losses(old: Any, new: Any, router: dict[str, Any]) -> str:
    """What differs in the micro-batches of two runs of one router."""
    if bound := _bound(router):
        return f"its {_MICRO_BATCH} is {old}, this run's is {new}, and {bound} depends on it"
    chosen, options = Router.configured(router["name"], _options(router))
    losses = [
        f"{name} ({how})" if how else name
        for name, how in chosen.shared_by_samples(options).items()
    ]
    return (
        f"its {LOSS_BATCH} is {old}, this run's is {new}, and so many samples share "
        f"{', '.join(losses)}"
    )


def _bound(router: dict[str, Any]) -> str:
    chosen, options = Router.configured(router["name"], _options(router))
    return chosen.bound_to_micro_batch(options)


def _options(router: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in router.items() if name != "name"}


def _with_loss_batch(stored: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """An older checkpoint has the micro-batch, whose samples shared their losses."""
    if LOSS_BATCH in stored or LOSS_BATCH not in identity:
        return stored
    same_as = identity[LOSS_BATCH] if identity[LOSS_BATCH] == ANY else stored.get(_MICRO_BATCH)
    return stored | {LOSS_BATCH: same_as}


def _with_added_options(stored: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """An older checkpoint lacks options that this run's router got later."""
    old, new = stored.get("model.router"), identity.get("model.router")
    if not isinstance(old, dict) or not isinstance(new, dict) or old.get("name") != new.get("name"):
        return stored
    added = Router.named(old["name"]).added
    missing = {name: value for name, value in added.items() if name in new and name not in old}
    return stored | {"model.router": old | missing}


def _with_checksums(stored: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """An older checkpoint holds the path of what its backbone reads, where the checksum is now.
    A path can be spelt in many ways, so it is not compared."""
    backbone = stored.get("model.backbone")
    added = identity.keys() - stored.keys()
    older = {key: name for key in added if (name := key.removeprefix("model.backbone.")) != key}
    if not isinstance(backbone, dict) or not all(backbone.get(n) for n in older.values()):
        return stored
    paths = {"model.backbone": backbone | dict.fromkeys(older.values())}
    return stored | {key: identity[key] for key in older} | paths
