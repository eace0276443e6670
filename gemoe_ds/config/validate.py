"""Whatever of a run can be known before any weight is read; every command checks the same."""

from __future__ import annotations

import os

from gemoe_ds.config.deepspeed import check_deepspeed
from gemoe_ds.config.deepspeed_file import in_base64
from gemoe_ds.config.schema import RunConfig
from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import Router


def validate_run(config: RunConfig, world_size: int, *, inputs_are_here: bool = True) -> None:
    """Raise ConfigError for the first thing that a run on `world_size` ranks would stumble over.

    `inputs_are_here`: data and weights must be found; they need not for what is only shown.
    """
    config.validate_world(world_size)
    if inputs_are_here:
        config.check_paths()
    if config.start_from is not None and config.resume != "auto":
        raise ConfigError(
            f"start_from={config.start_from}: is what resume=auto begins with, and "
            f"resume={config.resume}; set resume=auto, or start_from=null"
        )
    check_deepspeed(config, world_size)
    if config.model.compile == "dense" and config.zero_stage == 3:
        raise ConfigError(
            "model.compile=dense: ZeRO 3 gathers the weights of every module in a hook, and a "
            "graph would end at each; set model.compile=none, or take ZeRO 2"
        )
    router = config.model.router.router_class
    if router.trains_experts and config.model.trainable == "routers":
        raise ConfigError(
            f"model.trainable=routers: router {router.name!r} trains experts, and has nothing of "
            "its own that trains; set model.trainable=experts"
        )
    bound, train = router.bound_to_micro_batch(config.model.router.config), config.train
    if bound and train.loss_batch_size != train.micro_batch_size:
        raise ConfigError(
            f"train.auxiliary_batch_size={train.auxiliary_batch_size}: of router {router.name!r} "
            f"not only losses are of a micro-batch, but {bound}; set it to null, or "
            f"train.micro_batch_size={train.auxiliary_batch_size}"
        )
    able = [router.name for router in Router.known() if router.weighs_all]
    if config.model.gate_gradient == "dense" and router.name not in able:
        raise ConfigError(
            f"model.gate_gradient=dense: the gate of router {router.name!r} has no "
            f"gradient of experts that it does not choose; set chosen, or take {', '.join(able)}"
        )


def validate_evaluation(config: RunConfig) -> None:
    """The same for a run that is only read: on other ranks than it trained on, and perhaps on
    another machine, where neither its data nor its DeepSpeed file need be."""
    config.check_paths("model.", "data.tokenizer")
    if in_base64(config.deepspeed) or os.path.exists(config.deepspeed):
        check_deepspeed(config, None)
