"""The run's own checkpoints: shards, manifest, writing, resuming on any number of ranks."""
