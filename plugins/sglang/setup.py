"""Before the package is built: gemoe_sglang/_gemoe, the routing code of gemoe_ds as it stands, and
gemoe_sglang/_served, what the plugin for vLLM makes of it.

So that training and both servers share one implementation. A source distribution has the copies.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
OWN = HERE / "gemoe_sglang"
ROOT = HERE.parents[1]
VLLM = ROOT / "plugins" / "vllm" / "gemoe_vllm"
SHARED = ("counts", "described", "options", "routing")
# What differs is the package, and how a server is told its options.
REWRITTEN = {
    "gemoe_vllm._gemoe": "gemoe_sglang._gemoe",
    "gemoe_vllm": "gemoe_sglang._served",
    "--additional-config: gemoe": "--json-model-override-args: gemoe_options",
    '--additional-config \'{"gemoe"': '--json-model-override-args \'{"gemoe_options"',
    '\'{"gemoe": {"slots"': '\'{"gemoe_options": {"slots"',
}


def main() -> None:
    if (ROOT / "gemoe_ds" / "export" / "sources.py").is_file():
        sys.path.insert(0, str(ROOT))
        from gemoe_ds.export.sources import write_routing

        for copy in ("_gemoe", "_served"):
            shutil.rmtree(OWN / copy, ignore_errors=True)
        write_routing(OWN / "_gemoe", "gemoe_sglang._gemoe")
        write_shared(OWN / "_served")
    elif not (OWN / "_gemoe").is_dir():
        sys.exit(f"error: {OWN / '_gemoe'} is missing, and so is {ROOT / 'gemoe_ds'}, its source")
    setup()


def write_shared(out: Path) -> None:
    out.mkdir()
    (out / "__init__.py").write_text('"""The vLLM plugin\'s routing, copied."""\n', "utf-8")
    for name in SHARED:
        text = (VLLM / f"{name}.py").read_text(encoding="utf-8")
        for old, new in REWRITTEN.items():
            text = text.replace(old, new)
        (out / f"{name}.py").write_text(text, encoding="utf-8")


main()
