"""Answer the paper's benchmarks, score the answers, fill the paper's tables."""

from __future__ import annotations

from pathlib import Path

from gemoe_ds.cli.main import dispatch


def main() -> None:
    dispatch("gemoe benchmark", Path(__file__).parent, __name__, str(__doc__))
