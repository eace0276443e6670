"""Start a recipe on a cluster.

    gemoe submit RECIPE --nodes 4                     a SLURM job: rendered, kept, submitted
    gemoe submit RECIPE --nodes 4 --dry-run           print script, command, environments
    gemoe submit RECIPE --launcher deepspeed --hosts n1 n2          without SLURM, over ssh

A job that SLURM warns, preempts or loses is requeued and resumes from its newest checkpoint.
Settings of the site (modules, container, network) belong into launch/slurm/site.sh, or into the
file that GEMOE_SITE names.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from gemoe_ds.cluster.job import LAUNCHERS, PORT, Job
from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.parser import Parser, at_least_one

MODULE = "gemoe_ds.cli.train"
OPTIONS = ("time", "partition", "account", "qos", "job-name", "cpus-per-task", "constraint")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument(
        "--nodes", type=at_least_one, help="hosts (default: 1, or as many as --hosts)"
    )
    parser.add_argument(
        "--ranks-per-node", type=at_least_one, default=8, help="ranks per host (default: 8)"
    )
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="srun", help="default: srun (SLURM)"
    )
    parser.add_argument(
        "--hosts", nargs="+", default=[], help="without SLURM: host names, the master first"
    )
    parser.add_argument(
        "--master-port", type=_port, default=PORT, help="port of the master, without SLURM"
    )
    parser.add_argument("--no-gpus", action="store_true", help="run ranks on CPUs")
    for option in OPTIONS:
        reads = _time if option == "time" else str
        parser.add_argument(f"--{option}", type=reads, help=f"sbatch's --{option}")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        type=_sbatch_option,
        metavar="NAME[=VALUE]",
        help="any other option of sbatch, such as mem=64G or exclusive; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="print everything, start nothing")
    return parser.parse_or_exit(argv)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= 65535:
        raise argparse.ArgumentTypeError(f"{text:.20} is no port, a number from 1 to 65535")
    return int(text)


def _sbatch_option(text: str) -> tuple[str, str]:
    name, _, value = text.removeprefix("--").partition("=")
    if not re.fullmatch("[a-z][a-z-]*", name) or re.search(r"\s", value):
        raise argparse.ArgumentTypeError(f"{text!r:.40}: write NAME or NAME=VALUE, without spaces")
    if name in (*OPTIONS, "nodes"):
        raise argparse.ArgumentTypeError(f"{name} is an option of its own: --{name}")
    if name == "ntasks-per-node":
        raise argparse.ArgumentTypeError(f"{name} is --ranks-per-node")
    return name, value


def _time(text: str) -> str:
    """As sbatch reads it: it would refuse other text after the script is written."""
    if not re.fullmatch(
        r"(\d+-)?\d+(:\d+){0,2}|infinite|unlimited", text, re.IGNORECASE | re.ASCII
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r:.40} is no time limit; write minutes, hours:minutes:seconds or days-hours"
        )
    return text


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    with exit_on_error():
        job = _job(arguments)
        output = _check(arguments, job)
        if arguments.launcher == "srun":
            _submit(arguments, job, output)
        else:
            _launch(arguments, job, output)


def _job(arguments: argparse.Namespace) -> Job:
    given = {o: getattr(arguments, o.replace("-", "_")) for o in OPTIONS}
    sbatch = {option: value for option, value in given.items() if value is not None}
    sbatch |= dict(arguments.sbatch)
    if arguments.no_gpus:
        sbatch["gpus-per-node"] = "0"
    return Job(
        arguments.recipe,
        tuple(arguments.overrides),
        arguments.nodes or len(arguments.hosts) or 1,
        arguments.ranks_per_node,
        tuple(arguments.hosts),
        arguments.master_port,
        sbatch,
        Job.concerning_ranks(os.environ),
        **_program(),
    )


def _program() -> dict[str, Any]:
    """What ranks run: the script of a checkout, the module of an installed package."""
    from gemoe_ds.config.paths import CHECKOUT, PACKAGE

    if CHECKOUT is None:
        scripts = str(PACKAGE / "slurm")
        return {"program": ("-m", MODULE), "scripts": scripts, "python": sys.executable}
    there = "" if Path.cwd() == CHECKOUT else f"{CHECKOUT}/"
    return {"program": (f"{there}launch/train.py",), "scripts": f"{there}launch/slurm"}


def _check(arguments: argparse.Namespace, job: Job) -> Path:
    """Whatever can be known before the job waits in a queue for hours; the run's folder."""
    from gemoe_ds.config import load_config, validate_run

    config = load_config(job.recipe, _overrides(arguments, job))
    if job.nodes > 1 and arguments.launcher != "srun" and not job.hosts:
        raise ConfigError(f"--launcher {arguments.launcher} on {job.nodes} nodes needs --hosts")
    if arguments.launcher == "srun" and job.hosts:
        raise ConfigError("--hosts: SLURM chooses them; take --launcher deepspeed, or leave it out")
    validate_run(config, job.nodes * job.ranks_per_node, inputs_are_here=not arguments.dry_run)
    output = Path(config.output_dir)
    if not os.path.abspath(output).strip("/"):
        raise ConfigError(
            f"output_dir={output}: the script is kept beside it, and nothing is beside it; give "
            "another folder"
        )
    return output if output.name not in ("", "..") else Path(os.path.abspath(output))


def _overrides(arguments: argparse.Namespace, job: Job) -> list[str]:
    """Those of the run; the template gives a SLURM job --resume auto, so that a requeue goes on."""
    from gemoe_ds.config import load_config
    from gemoe_ds.config.cli_help import with_flags

    own = list(job.overrides)
    if arguments.launcher != "srun":
        return own
    found = with_flags(own, {"resume": "auto"})
    resume = load_config(job.recipe, own).resume
    if resume not in ("none", "auto"):
        raise ConfigError(
            f"resume={resume} in {job.recipe}: a SLURM job has --resume auto, so that it goes on "
            f"when it is requeued; add resume=auto start_from={resume} to begin there"
        )
    return found


def _submit(arguments: argparse.Namespace, job: Job, output: Path) -> None:
    from gemoe_ds.config.paths import TEMPLATE, Places

    template = Places.beside().locate("template", "launch/slurm/train.sbatch", TEMPLATE)
    script = job.sbatch_script(template.read_text(encoding="utf-8"))
    path = output.with_name(f"{output.name}.sbatch")
    if arguments.dry_run:
        print(f"# {path}\n{script}\n$ sbatch {path}")
        _print_environments(arguments.launcher, job)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    try:
        done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ConfigError("sbatch is not here; --launcher deepspeed needs no SLURM") from error
    if done.returncode:
        raise ConfigError(f"sbatch {path}: {done.stderr.strip()}")
    print(done.stdout.strip())


def _launch(arguments: argparse.Namespace, job: Job, output: Path) -> None:
    on_each = arguments.launcher == "torchrun" and job.nodes > 1
    reads_hostfile = arguments.launcher == "deepspeed" and bool(job.hosts)
    hostfile = output.with_name(f"{output.name}.hostfile")
    command = job.command(arguments.launcher, hostfile=str(hostfile))
    if arguments.dry_run or on_each:
        if reads_hostfile:
            print(f"# {hostfile}\n{job.hostfile()}")
        if not on_each:
            print(f"$ {shlex.join(command)}")
        _print_environments(arguments.launcher, job, commands=on_each)
        return
    if reads_hostfile:
        hostfile.parent.mkdir(parents=True, exist_ok=True)
        hostfile.write_text(job.hostfile(), encoding="utf-8")
    try:
        os.execvp(command[0], command)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{command[0]} is not on PATH; activate the environment that has it"
        ) from error


def _print_environments(launcher: str, job: Job, *, commands: bool = False) -> None:
    for node in range(job.nodes):
        host = job.hosts[node] if job.hosts else f"node {node}"
        found = " ".join(f"{k}={v!r}" for k, v in job.environment(launcher, node).items())
        print(f"# {host}: {found}")
        if commands:
            print(f"$ {shlex.join(job.command(launcher, node))}")


if __name__ == "__main__":
    main()
