"""Train a recipe: alone, or under deepspeed, torchrun, srun or mpirun."""

from __future__ import annotations

import sys

from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.errors import exit_on_error


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> None:
    if argv is None:  # signals are heeded before imports that take seconds
        argv, stop = sys.argv[1:], StopRequest().listen()
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
            from gemoe_ds.train.layout import print_layouts

            print_layouts(config, flags.estimate, flags.gpu_memory)
            return
        from gemoe_ds.train.run import train

        train(config, dry_run=flags.dry_run, stop=stop)


if __name__ == "__main__":
    main()
