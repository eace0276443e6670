"""Several `gemoe` commands in one process, which saves the imports of all but the first.

    python -m experiments.in_turn train RECIPE ... --then evaluate RUN/config.yaml ...

Ends with the first that fails, and its exit code.
"""

from __future__ import annotations

import itertools
import sys

from gemoe_ds.cli import evaluate, train
from gemoe_ds.errors import MISTAKE

COMMANDS = {"train": train.main, "evaluate": evaluate.main}
THEN = "--then"


def main(words: list[str]) -> int:
    parts = [list(part) for is_then, part in itertools.groupby(words, THEN.__eq__) if not is_then]
    if not parts or any(part[0] not in COMMANDS for part in parts):
        print(f"error: {' | '.join(COMMANDS)}, {THEN} between two of them", file=sys.stderr)
        return MISTAKE
    for name, *arguments in parts:
        COMMANDS[name](arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
