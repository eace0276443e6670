"""The training loop and what goes on around it; knows nothing about any routing method.

The package itself can be called: `gemoe_ds.train("trial", "train.steps=10")` runs a recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemoe_ds.cluster.stopping import StopRequest
    from gemoe_ds.config import RunConfig
    from gemoe_ds.train.hooks import Hook


def start(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *overrides: str,
    dry_run: bool = False,
    stop: StopRequest | None = None,
    hooks: Sequence[Hook] = (),
) -> Path:
    """Train a recipe, as `gemoe train` does: alone, or on every rank of a launcher.

    Args:
        config: a `RunConfig`, the same as a dict, or the path or name of a recipe.
        overrides: `key.path=value`, e.g. "train.steps=10".
        dry_run: build everything, take one step, write nothing.
        stop: ask it to stop, from a signal handler, and the run saves and ends.
        hooks: your own, beside those of `train.hooks` (gemoe_ds.train.hooks.Hook).

    Returns:
        The folder of the run: checkpoints/, metrics.jsonl, config.yaml.

    Raises:
        ConfigError, DataError, CheckpointError: the recipe, the data or a checkpoint cannot
            be used; one line, mostly before anything is loaded.
        Stopped: `stop` was asked; with the step saved.
    """
    from gemoe_ds.config.load import as_config
    from gemoe_ds.config.validate import validate_run
    from gemoe_ds.engine.adopt_launcher import launched_world_size

    world_size = launched_world_size()
    run = as_config(config, overrides)
    validate_run(run, world_size)
    from gemoe_ds.train.run import train

    train(run, dry_run=dry_run, stop=stop, hooks=hooks)
    return Path(run.output_dir)


class _Callable(ModuleType):
    """A module that is a function as well: both have the name `gemoe_ds.train`."""

    __call__ = staticmethod(start)


sys.modules[__name__].__class__ = _Callable
