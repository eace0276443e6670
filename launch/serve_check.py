#!/usr/bin/env python3
"""`gemoe serve-check` as a file."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Run from a checkout, uninstalled; and without this folder, whose evaluate.py is no package.
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p).resolve() != HERE)]

from gemoe_ds.cli.serve_check import main  # noqa: E402

if __name__ == "__main__":
    main()
