#!/usr/bin/env python3
"""`gemoe benchmark` as a file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, uninstalled

from gemoe_ds.cli.benchmark import main

if __name__ == "__main__":
    main()
