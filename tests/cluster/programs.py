"""What a machine must have for a cluster on it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable


def why_not(programs: Iterable[str]) -> str:
    """What is missing to run one here; empty if nothing is."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed: make cluster-tools"
    return "" if os.geteuid() == 0 else "needs root"
