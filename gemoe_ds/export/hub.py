"""What of the arguments of `from_pretrained` says where a folder's files come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WHERE = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def where(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a download of other files of the folder takes too."""
    return {name: arguments[name] for name in _WHERE if arguments.get(name) is not None}
