"""A DeepSpeed file as people have it -> the options that reach DeepSpeed, or one clear line.

What is said here holds whatever the recipe says; gemoe_ds/config/deepspeed.py compares the two.
"""

from __future__ import annotations

import base64
import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hjson  # type: ignore[import-untyped]

from gemoe_ds.config.deepspeed_keys import KEYS, RENAMED, Key
from gemoe_ds.config.deepspeed_values import choice, flag, number
from gemoe_ds.errors import ConfigError

AUTO = "auto"
ZERO = "zero_optimization"
# Hugging Face fills these from the model; the other "auto" are the recipe's or DeepSpeed's default.
FROM_HIDDEN_SIZE = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)
_KEPT_AUTO = {f"{ZERO}.{name}" for name in FROM_HIDDEN_SIZE}
_PACKAGES = {"wandb": "wandb", "comet": "comet_ml", "tensorboard": "tensorboard"}
# Keys that the nearest name would not lead to: of other programs, and a former one.
_INSTEAD = {
    "moe": "remove it; parallel.ep_size of the recipe says over how many ranks experts go",
    "aio.thread_count": "it is intra_op_parallelism now",
}
_SHOWN = 3


@dataclass(frozen=True)
class DeepSpeedFile:
    """Options with DeepSpeed's names and types; `ignored`: a line for each that has no effect."""

    name: str  # for messages
    options: dict[str, Any]
    ignored: tuple[str, ...] = ()

    @property
    def zero(self) -> dict[str, Any]:
        found: dict[str, Any] = self.options.get(ZERO, {})
        return found

    @property
    def stage(self) -> int:
        return int(self.zero.get("stage", 0))


def read_deepspeed_file(text: str) -> DeepSpeedFile:
    """The file at this path, or, as DeepSpeed has it, JSON in urlsafe base64.

    Raises ConfigError: unreadable, no JSON object, unknown key, wrong type or value, refused key.
    """
    inline = in_base64(text)
    name = f"deepspeed={text:.20}... (base64)" if inline else text
    options = _parsed(name, inline) if inline else _parsed(text, _text_of(Path(text)))
    if not isinstance(options, dict):
        raise ConfigError(f"deepspeed={text}: must hold a JSON object, got {options!r:.40}")
    reader = _Reader()
    kept = reader.section("", _with_present_names(name, options))
    reader.check_packages(kept)
    problems = reader.wrong + [f"{', '.join(k)}: {why}" for why, k in reader.refused.items()]
    if problems:
        more = len(problems) - _SHOWN
        shown = problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise ConfigError(f"{name}: {'; '.join(shown)}")
    ignored = (f"{name}: ignored: {', '.join(k)}: {why}" for why, k in reader.ignored.items())
    return DeepSpeedFile(name, kept, tuple(ignored))


def in_base64(text: str) -> str | None:
    """The JSON that `text` is in urlsafe base64; None if it is something else, such as a path."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+=*", text) or Path(text[:200]).exists():
        return None
    try:
        decoded = base64.urlsafe_b64decode(text).decode("utf-8").strip()
    except ValueError:
        return None
    return decoded if decoded.startswith("{") else None


def _text_of(path: Path) -> str:
    said = f"deepspeed={path}"
    if os.path.isdir(path):  # which knows names that are too long
        inside = ", ".join(sorted(p.name for p in path.glob("*.json"))[:8])
        holds = f"; it holds {inside}" if inside else ""
        raise ConfigError(f"{said}: is a folder; give the JSON file{holds}")
    try:
        data = path.read_bytes()
        text = data.decode(json.detect_encoding(data)).lstrip("\ufeff")
    except OSError as error:
        raise ConfigError(f"{said}: cannot read it: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{said}: is no text file; give DeepSpeed's JSON") from None
    if not text.strip():
        raise ConfigError(f"{said}: is empty; {{}} would be DeepSpeed's defaults (ZeRO 0)")
    if path.suffix.lower() in (".yaml", ".yml"):
        raise ConfigError(f"{said}: is a YAML file; DeepSpeed's options are JSON")
    return text


def _parsed(name: str, text: str) -> Any:
    """JSON, or, as DeepSpeed reads it, Hjson: with comments and commas too many or too few."""
    try:
        try:
            return json.loads(text, object_pairs_hook=_without_duplicates)
        except json.JSONDecodeError as error:
            problem = str(error)
            return hjson.loads(
                text, object_pairs_hook=_without_duplicates, object_hook=None, use_decimal=False
            )
    except hjson.HjsonDecodeError:
        raise ConfigError(f"deepspeed={name}: not valid JSON: {problem}") from None
    except RecursionError:
        raise ConfigError(f"deepspeed={name}: not valid JSON: nested too deep") from None
    except ValueError as error:  # of _without_duplicates, or an endless number
        raise ConfigError(f"deepspeed={name}: not valid JSON: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} stands twice")
        found[key] = value
    return found


def _with_present_names(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's former and internal names replaced by those that the table has."""
    if isinstance(options.get(ZERO), bool):  # its first format
        options = options | {ZERO: {"stage": int(options[ZERO])}}
    renamed = _renamed(name, "", options)
    zero = renamed.get(ZERO)
    if isinstance(zero, dict):
        for old, new in (
            ("cpu_offload", "offload_optimizer"),
            ("cpu_offload_param", "offload_param"),
        ):
            zero = zero | ({old: True} if _is_true(zero.get(old)) else {})
            if zero.get(old) is True:
                if zero.get(new) not in (None, AUTO):
                    raise ConfigError(f"{name}: {ZERO}.{old} is the former name of {new}; keep one")
                zero = zero | {new: {"device": "cpu"}}
            if isinstance(zero.get(old), bool):
                zero = {key: value for key, value in zero.items() if key != old}
        renamed[ZERO] = zero
    return renamed


def _is_true(value: Any) -> bool:
    try:
        return value is not None and flag(value)
    except ValueError:  # which the reader says
        return False


def _renamed(name: str, prefix: str, options: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in options.items():
        path = RENAMED.get(prefix + key, prefix + key)
        new = path.removeprefix(prefix)
        if new in found or (new != key and new in options):
            raise ConfigError(f"{name}: {prefix}{key} and {path} are one option; keep one of them")
        found[new] = _renamed(name, f"{path}.", value) if isinstance(value, dict) else value
    return found


class _Reader:
    """Walks a file, and collects what is wrong with it and what has no effect."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.refused: dict[str, list[str]] = {}  # why -> keys
        self.ignored: dict[str, list[str]] = {}

    def section(self, prefix: str, options: dict[str, Any]) -> dict[str, Any]:
        """What of a section reaches DeepSpeed or is compared with the recipe."""
        kept = {}
        for name, value in options.items():
            path = prefix + name
            if name.startswith(("_", "//", "#")):  # a comment
                continue
            if path not in KEYS:
                self.wrong.append(f"{path}: DeepSpeed has no such key; {_nearest(path)}")
                continue
            key = KEYS[path]
            if key.fate in ("ignored", "refused"):
                self._leave_out(path, key, value)
            elif value == AUTO and path not in (
                ZERO,
                f"{ZERO}.stage",
            ):  # nothing could fill these in
                if path in _KEPT_AUTO or key.fate == "recipe":
                    kept[name] = value
            elif value is not None or not key.kind.endswith("?"):
                try:
                    kept[name] = self._value(path, key.kind.removesuffix("?"), value)
                except ValueError as error:
                    self.wrong.append(f"{path}={_shown(value)}: should be {error}")
        return kept

    def check_packages(self, options: dict[str, Any]) -> None:
        """Those that a monitor would import when the engine is built."""
        for section, package in _PACKAGES.items():
            wanted = options.get(section, {})
            if isinstance(wanted, dict) and wanted.get("enabled") is True:
                if importlib.util.find_spec(package) is None:
                    self.wrong.append(
                        f"{section}.enabled=true needs the package {package}, which is not "
                        f"installed here: pip install {package}, or remove the section"
                    )

    def _leave_out(self, path: str, key: Key, value: Any) -> None:
        if key.kind.startswith("section") and not isinstance(value, dict | bool | None):
            self.wrong.append(f"{path}={_shown(value)}: should be an object")
            return
        if isinstance(value, dict) and key.kind.startswith("section"):
            unknown = [n for n in value if f"{path}.{n}" not in KEYS and n[0:1] not in ("_", "/")]
            self.wrong += [
                f"{path}.{name}: DeepSpeed has no such key; {_nearest(f'{path}.{name}')}"
                for name in unknown
            ]
        if not _asks(path, key, value):
            return
        said = path if isinstance(value, dict) else f"{path}={_shown(value)}"
        (self.refused if key.fate == "refused" else self.ignored).setdefault(key.why, []).append(
            said
        )

    def _value(self, path: str, kind: str, value: Any) -> Any:
        """`value` as the type that DeepSpeed wants; ValueError says what it should be."""
        if kind == "any":
            return value
        if kind == "section":
            if not isinstance(value, dict):
                example = ', such as {"device": "cpu"}' if "offload" in path else ""
                raise ValueError(f"an object{example}")
            return self.section(f"{path}.", value)
        if kind == "flag":
            return flag(value)
        if kind == "text":
            if not isinstance(value, str):
                raise ValueError("text")
            return value
        if kind == "list":
            value = [value] if isinstance(value, str) else value
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise ValueError("a list of texts")
            return value
        if "|" in kind:
            return choice(kind.split("|"), value)
        return number(kind, value)


def _asks(path: str, key: Key, value: Any) -> bool:
    """Whether a value asks for something; a section does if it is on."""
    if value is None or value == AUTO:
        return False
    if isinstance(value, dict):
        enabled = value.get("enabled", True)
        if enabled in (False, None, AUTO, "false", 0):
            return False
        return any(
            _asks(f"{path}.{name}", KEYS.get(f"{path}.{name}", Key("any", "refused")), inner)
            for name, inner in value.items()
        )
    if not key.off:
        return value not in (False, [], "false")
    return not any(_same(value, off) for off in key.off)


def _same(value: Any, off: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return json.dumps(value) == off
    try:
        return float(value) == float(off)
    except ValueError:
        return str(value).lower() == off


def _nearest(path: str) -> str:
    """Where the user may have meant to write: the right name beside it, or its right section."""
    if path in _INSTEAD:
        return _INSTEAD[path]
    section, _, name = path.rpartition(".")
    elsewhere = [known for known in KEYS if known.rpartition(".")[2] == name]
    if elsewhere:
        return f"it belongs in {' or '.join(k.rpartition('.')[0] or 'the top' for k in elsewhere)}"
    beside = list(_names_in(section))
    near = difflib.get_close_matches(name, beside, n=1, cutoff=0.6) or difflib.get_close_matches(
        name, [known.rpartition(".")[2] for known in KEYS], n=1, cutoff=0.8
    )
    return f"did you mean {near[0]}?" if near else "remove it"


def _names_in(section: str) -> Iterator[str]:
    for known in KEYS:
        inside, _, name = known.rpartition(".")
        if inside == section:
            yield name


def _shown(value: Any) -> str:
    return f"{json.dumps(value)[:60]}"
