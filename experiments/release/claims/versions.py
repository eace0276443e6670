"""Pages whose decimals are versions."""

from __future__ import annotations

from experiments.release.claim import Claim

CLAIMS: list[Claim] = []

NOT_MEASURED = {
    "docs/README.md": ["From 0.1 to 0.2"],
    "docs/migration.md": [
        "From 0.1 to 0.2",
        "data of 0.1",
        "0.3 will not",
        "| 0.1 | 0.2",
        "runs that 0.1",
    ],
}
