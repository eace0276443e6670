"""Which versions of SGLang the plugin works with: others are refused by name."""

from __future__ import annotations

READ = ("0.5.23",)  # its hooks were read in these; none was run


def check(version: str | None = None) -> None:
    """RuntimeError, of one line, unless `version` is supported; default: the SGLang installed."""
    if version is None:
        import sglang

        version = sglang.__version__
    if version.partition("+")[0] not in READ:
        from gemoe_sglang import __version__

        raise RuntimeError(
            f"gemoe-sglang {__version__} works with SGLang {', '.join(READ)}, this is {version}; "
            "install that, or unset SGLANG_EXTERNAL_MODEL_PACKAGE, which serves exported folders "
            "with the base model's fixed k"
        )
