"""Before the package is built: gemoe_vllm/_gemoe, the routing code of gemoe_ds as it stands.

So that training and serving share one implementation, without gemoe_ds and what it depends on. A
source distribution has the copy, and no gemoe_ds beside it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
COPY = HERE / "gemoe_vllm" / "_gemoe"
ROOT = HERE.parents[1]


def main() -> None:
    if (ROOT / "gemoe_ds" / "export" / "sources.py").is_file():
        sys.path.insert(0, str(ROOT))
        from gemoe_ds.export.sources import write_routing

        shutil.rmtree(COPY, ignore_errors=True)
        write_routing(COPY, "gemoe_vllm._gemoe")
    elif not COPY.is_dir():
        sys.exit(f"error: {COPY} is missing, and so is {ROOT / 'gemoe_ds'}, which it is made from")
    setup()


main()
