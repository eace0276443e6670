"""The only room that imports deepspeed: processes, expert-parallel groups, engine, checkpoints."""

import os

from gemoe_ds.engine.launcher_env import settle_accelerator

settle_accelerator(os.environ)  # here, since importing deepspeed reads it
