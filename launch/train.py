#!/usr/bin/env python3
"""Train a recipe: under `deepspeed`, `torchrun`, `srun`, `mpirun`, or alone."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, uninstalled

from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.errors import exit_on_error


def main(argv: list[str], stop: StopRequest | None = None) -> None:
    with exit_on_error():
        from gemoe_ds.engine.adopt_launcher import adopt_launcher, launched_world_size

        adopt_launcher()
        from gemoe_ds.config import parse_cli, validate_run

        config, flags = parse_cli(argv)
        if flags.print_config:
            print(config.dump_yaml(), end="")
            return
        validate_run(config, flags.estimate or launched_world_size())
        if flags.estimate:
            from gemoe_ds.train.estimate import print_estimate

            print_estimate(config, flags.estimate)
            return
        from gemoe_ds.train.run import train

        train(config, dry_run=flags.dry_run, stop=stop)


if __name__ == "__main__":
    main(sys.argv[1:], StopRequest().listen())  # before imports that take seconds
