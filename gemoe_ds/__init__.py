"""gemoe_ds: train MoE models in which every token picks how many experts it needs."""

__version__ = "0.1.0"
