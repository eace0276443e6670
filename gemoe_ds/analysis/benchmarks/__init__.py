"""The paper's tables and figures from what the benchmarks left behind; never a model."""
