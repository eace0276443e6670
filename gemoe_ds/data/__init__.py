"""Samples on disk, batches in memory: the one schema that every source is converted to."""
