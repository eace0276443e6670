"""Which versions of vLLM the plugin works with: others are refused by name."""

from __future__ import annotations

import re

OLDEST, NEWEST = (0, 29), (0, 33)  # minor versions, both included


def check(version: str | None = None) -> None:
    """RuntimeError, of one line, unless `version` is supported; default: the vLLM installed."""
    if version is None:
        import vllm

        version = vllm.__version__
    found = re.match(r"(\d+)\.(\d+)", version)
    if not (found and OLDEST <= tuple(map(int, found.groups())) <= NEWEST):
        from gemoe_vllm import __version__

        oldest, newest = (".".join(map(str, one)) for one in (OLDEST, NEWEST))
        raise RuntimeError(
            f"gemoe-vllm {__version__} works with vLLM {oldest} to {newest}, this is {version}; "
            "install one of those, or start without the plugin: VLLM_PLUGINS= (empty), which "
            "serves exported folders with the base model's fixed k"
        )
