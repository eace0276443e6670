"""Make what a run reads: samples from LLaVA's JSON and images, a tokenizer."""

from __future__ import annotations

from pathlib import Path

from gemoe_ds.cli.main import dispatch


def main() -> None:
    dispatch("gemoe data", Path(__file__).parent, __name__, str(__doc__))
