#!/usr/bin/env python3
"""`gemoe doctor` as a file, for the launcher that would start the run."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Run from a checkout, uninstalled; and without this folder, whose evaluate.py is no package.
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p).resolve() != HERE)]

from gemoe_ds.cli.doctor import main  # noqa: E402

if __name__ == "__main__":
    main()
