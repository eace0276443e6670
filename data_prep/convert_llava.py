#!/usr/bin/env python3
"""`gemoe data convert` as a file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, uninstalled

from gemoe_ds.cli.data.convert import main

if __name__ == "__main__":
    main()
