"""What a model costs: operations, and memory beside the weights."""
