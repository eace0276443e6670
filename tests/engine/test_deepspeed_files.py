"""Files of the kinds that people have, in DeepSpeed's own hands: it takes what they come to, and
the weights after two steps are those of ZeRO 0."""

from __future__ import annotations

import json

import torch

from gemoe_ds.config.load import config_from_dict
from tests.helpers import run_ranks
from tests.tiny import make_model, num_targets, random_batch, write_base

AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
COMMON = dict.fromkeys((*AUTO, "gradient_clipping"), "auto") | {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 32},
}
HIDDEN = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
CPU = {"device": "cpu", "pin_memory": True}
FILES = {  # as LLaMA-Factory, axolotl, LLaVA and MoE-LLaVA have them
    "zero0": COMMON | {"zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 0}},
    "zero1": COMMON | {"zero_optimization": {"stage": 1, "overlap_comm": True}},
    "zero2_offload": COMMON
    | {
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": CPU,
            "allgather_bucket_size": 5e8,
            "round_robin_gradients": True,
            "reduce_bucket_size": "auto",
            "sub_group_size": 1e9,
        }
    },
    "zero3_offload": COMMON
    | {
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps"), "auto")},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "steps_per_print": 1e5,
        "zero_optimization": dict.fromkeys(HIDDEN, "auto")
        | {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU, "overlap_comm": True}
        | {"sub_group_size": 0, "max_live_parameters": 0, "max_reuse_distance": 0}
        | {"gather_16bit_weights_on_model_save": True},
    },
}


def weights_by_file(rank: int, folder) -> dict[str, dict[str, torch.Tensor]]:
    from gemoe_ds.engine.build import initialize
    from gemoe_ds.engine.world import distributed
    from gemoe_ds.engine.zero import full_value

    base, found = write_base(folder / str(rank)), {}
    with distributed() as world:
        for name, options in FILES.items():
            file = folder / f"{name}.json"
            file.write_text(json.dumps(options))
            model = make_model(base, train="all", dtype=torch.float32).train()
            engine = initialize(model, run_config(base, file), world)
            for step in range(2):
                batch = random_batch(step)
                targets = num_targets(batch)
                engine.backward(engine(**batch, targets_per_micro_batch=targets)["loss"])
                engine.step()
            found[name] = {n: full_value(p).clone() for n, p in model.trainable().items()}
            engine.destroy()
    return found


def run_config(base, file):
    return config_from_dict(
        {
            "output_dir": "unused",
            "model": {
                "backbone": {"name": "tiny"},
                "checkpoint": str(base[0]),
                "router": {"name": "gemoe"},
                "trainable": "all",
                "dtype": "float32",
            },
            "data": {"train_path": "unused", "tokenizer": str(base[1])},
            "optim": {"lr": 1e-2, "eps": 1e-3, "schedule": "constant"},
            "train": {"steps": 2, "micro_batch_size": 2},
            "deepspeed": str(file),
        }
    )


def test_usual_files_train_alike(tmp_path):
    (found,) = run_ranks(weights_by_file, 1, tmp_path)
    for name, weights in found.items():
        for parameter, weight in weights.items():
            torch.testing.assert_close(
                weight, found["zero0"][parameter], atol=1e-5, rtol=0, msg=f"{name}: {parameter}"
            )
