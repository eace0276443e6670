"""Checkpoints of the Hugging Face layout: their keys, reading them, rewriting them."""
