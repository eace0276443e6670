"""The servers that are installed, and one of them at work in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import gemoe_ds
from gemoe_ds.errors import ConfigError
from gemoe_ds.serving.exchange import STATIC, Job, Served, read_served, write_job

PLUGIN = "gemoe"  # the name of our entry point
# All kinds of plugins: VLLM_PLUGINS, a list of names, leaves out the others of every kind.
_PROBE = """
import json
from importlib.metadata import entry_points
from importlib.util import find_spec
groups = [group for group in entry_points().groups if group.startswith("vllm.")]
plugins = sorted({point.name for group in groups for point in entry_points(group=group)})
print(json.dumps({"vllm": find_spec("vllm") is not None, "plugins": plugins}))
"""


@dataclass(frozen=True)
class Server:
    """An interpreter, and what serves in it."""

    name: str  # transformers or vllm
    python: str
    plugins: tuple[str, ...] = ()

    @property
    def routes(self) -> bool:
        """Whether it can serve the trained k."""
        return self.name == "transformers" or PLUGIN in self.plugins


def find_servers(python: Path | None) -> list[Server]:
    """transformers here, and vLLM in `python`, or here if none is given."""
    found = [Server("transformers", sys.executable)]
    interpreter = str(python.absolute()) if python else sys.executable
    probe = _probe(interpreter)
    if probe["vllm"]:
        found.append(Server("vllm", interpreter, tuple(probe["plugins"])))
    elif python:
        raise ConfigError(
            f"--python {python} cannot import vllm; give the interpreter of an environment that "
            "has it, or leave --python out"
        )
    return found


def _probe(interpreter: str) -> dict:
    try:
        done = subprocess.run(
            [interpreter, "-c", _PROBE], capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"--python {interpreter} does not start: {error}") from error
    try:
        content: dict = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ConfigError(f"--python {interpreter} is no Python that runs: {why}") from None
    return content


class ServerError(ConfigError):
    """A server could not load the folder or answer; its log is kept."""


def run(server: Server, job: Job, work: Path) -> Served:
    """Serve `job` in a process that ends with this call.

    `work` is a folder for what goes there and back; NAME.log in it is all that the process said.
    Raises ServerError with the server's own words if it fails.
    """
    name = f"{server.name}_{job.mode}"
    paths = work / f"{name}.job.json", work / f"{name}.json"
    write_job(job, paths[0])
    log = work / f"{name}.log"
    words = ["-m", "gemoe_ds.serving.ask", server.name, *map(str, paths)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [server.python, *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=_environment(server, job, work),
            cwd=work,
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    served = read_served(paths[1]) if paths[1].exists() else f"it ended with exit code {code}"
    if isinstance(served, str):
        raise ServerError(f"{server.name}, {job.mode} k: {served} (its log: {log})")
    return served


def _environment(server: Server, job: Job, work: Path) -> dict[str, str]:
    """That of this process, with this package, and no other of its folder, to be imported."""
    alone = work / "import"
    alone.mkdir(exist_ok=True)
    if not (alone / "gemoe_ds").exists():
        (alone / "gemoe_ds").symlink_to(Path(gemoe_ds.__file__).parent)
    before = os.environ.get("PYTHONPATH")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(alone), *([before] if before else [])]),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(work / "modules"),  # code of the folder as it is now
        "TOKENIZERS_PARALLELISM": "false",
    }
    if server.name == "vllm":
        environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"} | environment
        if job.mode == STATIC:
            others = [name for name in server.plugins if name != PLUGIN]
            environment["VLLM_PLUGINS"] = ",".join(others)
    return environment
