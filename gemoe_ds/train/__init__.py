"""The training loop and what goes on around it; knows nothing about any routing method."""
