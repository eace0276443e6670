"""hooks.cpp compiled, once for each torch, and preloaded into a process that then has a GPU to
all appearance."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("hooks.cpp")
TORCH = Path(torch.__file__).parent


def why_not() -> str | None:
    """What is missing, if anything is."""
    if torch.version.cuda or torch.version.hip:
        return "this torch has a GPU's own hooks: a build for CPUs is wanted"
    if not compiler():
        return "no C++ compiler"
    if not (TORCH / "include/ATen/detail/CUDAHooksInterface.h").exists():
        return "torch's headers are missing"
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    return None if sys.platform == "linux" else "LD_PRELOAD is Linux's"


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or shutil.which("c++") or "")


def library() -> Path:
    """Compiled unless it is there."""
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {TORCH}".encode()).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = home / "gemoe_ds" / f"pretended_gpu_{key[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_suffix(f".{os.getpid()}")  # several test processes may come at once
    command = [*compiler(), "-shared", "-fPIC", "-std=c++20", f"-I{TORCH}/include", str(SOURCE)]
    command += [f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH}/lib"]
    subprocess.run([*command, "-o", str(made)], check=True)
    made.replace(path)
    return path


def run(*files: str) -> None:
    """The tests of these files, in a process of their own with a pretended GPU."""
    preloaded = [str(library()), *filter(None, [os.environ.get("LD_PRELOAD")])]
    environment = os.environ | {"LD_PRELOAD": ":".join(preloaded), "TRITON_INTERPRET": "1"}
    environment["PYTEST_ADDOPTS"] = ""  # of these tests' own parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [str(SOURCE.with_name(file)) for file in files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
