"""The names that --tasks takes: sets, tasks, groups and tags of both harnesses.

gemoe benchmark list             the sets
gemoe benchmark list mmlu pro    all names that hold these words
"""

from __future__ import annotations

import argparse

from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.parser import Parser


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    flags = parser.parse_or_exit(argv)
    with exit_on_error():
        from gemoe_ds.evaluation.benchmarks.load_tasks import SETS, all_names

        if not flags.words:
            for name, members in SETS.items():
                print(f"{name}: {' '.join(members)}")
            return
        words = [word.lower() for word in flags.words]
        found = [(h, n) for h, n in all_names() if all(word in n.lower() for word in words)]
        if not found:
            raise ConfigError(f"no task of either harness has {' and '.join(words)} in its name")
        for harness, name in found:
            print(f"{harness}:{name}")


if __name__ == "__main__":
    main()
