"""Check hosts and ranks for a recipe, without a model; start it as the run would be.

    deepspeed --hostfile hosts --module gemoe_ds.cli.doctor RECIPE [key.path=value ...]
    srun -N 4 --ntasks-per-node 8 ... gemoe doctor RECIPE

Every run does the same before it loads anything.
"""

from __future__ import annotations

import sys

from gemoe_ds.errors import exit_on_error


def main(argv: list[str] | None = None) -> None:
    with exit_on_error():
        from gemoe_ds.engine.adopt_launcher import adopt_launcher, launched_world_size

        adopt_launcher()
        from gemoe_ds.config import parse_cli, validate_run
        from gemoe_ds.train.run import check

        config, _ = parse_cli(sys.argv[1:] if argv is None else argv)
        validate_run(config, launched_world_size())
        check(config)


if __name__ == "__main__":
    main()
