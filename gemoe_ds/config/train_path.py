"""The parts of a `data.train_path` that is a list, each mistake in one clear line."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError

from gemoe_ds.data.mixture import MixturePart, check_parts
from gemoe_ds.errors import ConfigError

_EXAMPLE = "[{path: FOLDER, repeat: 2}, {path: FOLDER}]"


def parts_of(value: object) -> tuple[MixturePart, ...]:
    """ConfigError for what is no list of parts."""
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{value!r:.60} is neither a folder nor a list such as {_EXAMPLE}")
    parts = tuple(_part(number, part) for number, part in enumerate(value, 1))
    check_parts(parts)
    return parts


def _part(number: int, value: Any) -> MixturePart:
    if isinstance(value, MixturePart):
        return value
    if not isinstance(value, dict):
        raise ConfigError(
            f"part {number} is {value!r:.60}, no mapping; write the list as {_EXAMPLE}"
        )
    valid = list(MixturePart.model_fields)
    for key in value:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"part {number}: {key}: no such option; has {', '.join(valid)}{hint}")
    try:
        return MixturePart.model_validate(value)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key, cause = detail["loc"][0], detail.get("ctx", {}).get("error")
        if detail["type"] == "missing":
            raise ConfigError(f"part {number}: {key}: missing; each part is a folder") from None
        said = str(cause) if isinstance(cause, ConfigError) else detail["msg"]
        said = said.removeprefix("Input ")
        raise ConfigError(f"part {number}: {key}={detail['input']!r:.60}: {said}") from None
