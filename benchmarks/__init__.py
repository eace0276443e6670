"""What the MoE layer costs on this machine, beside its peers: `python -m benchmarks`."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
