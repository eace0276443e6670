"""Options under the names that they had before version 0.2: read for one version more."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

from gemoe_ds.errors import ConfigError

NEW = {  # the whole old path -> the last part of the new one
    "model.train": "trainable",
    "model.recompute": "activation_checkpointing",
    "model.router.renormalise": "norm_topk_prob",
    "model.backbone.renormalise": "norm_topk_prob",
    "data.train": "train_path",
    "data.validation": "validation_path",
    "data.threads": "num_workers",
    "data.max_broken": "max_bad_samples",
    "optim.clip_norm": "max_grad_norm",
    "train.micro_batch": "micro_batch_size",
    "train.accumulation": "gradient_accumulation_steps",
    "train.global_batch": "global_batch_size",
    "monitor.ledger": "sample_log",
}


def with_new_names(tree: Any, above: str = "", *, warn: bool = True) -> Any:
    """The options, nested or with dotted keys, under their names of today.

    `warn`: say so, each name once a process, for what a user wrote. Raises ConfigError for an
    option that stands there under both names.
    """
    if not isinstance(tree, Mapping):
        return tree
    renamed: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{above}{key}"
        name = key
        if path in NEW:
            name = f"{key.rpartition('.')[0]}.{NEW[path]}".removeprefix(".")
            if name in tree:
                raise ConfigError(f"{path} is the old name of {above}{name}: give one of them")
            if warn:
                _say_once(path, f"{above}{name}")
        renamed[name] = with_new_names(value, f"{path}.", warn=warn)
    return renamed


@functools.cache
def _say_once(old: str, new: str) -> None:
    if int(os.environ.get("RANK") or 0) == 0:
        print(
            f"warning: {old} is called {new} now; the old name is removed in 0.3", file=sys.stderr
        )
