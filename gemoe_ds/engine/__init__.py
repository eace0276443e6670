"""The only room that imports deepspeed: processes, expert-parallel groups, engine, checkpoints."""
