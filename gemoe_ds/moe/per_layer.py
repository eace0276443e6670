"""An option of a router that is one number for the model, or a list: one for every MoE layer."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from gemoe_ds.errors import ConfigError


def _numbers(given: Any) -> Any:
    some = given if isinstance(given, list | tuple) else [given]
    is_number = [isinstance(v, int | float) and not isinstance(v, bool) for v in some]
    if not some or not all(is_number) or not all(map(math.isfinite, some)):
        raise ConfigError(f"{given!r:.40}: give a number, or a list with one for each MoE layer")
    return given


PerLayer = Annotated[float | tuple[float, ...], BeforeValidator(_numbers)]


def within(low: float, high: float, *, above: bool = False) -> AfterValidator:
    """For `Annotated[PerLayer, within(0, 1)]`: every number is in low..high; `above`: not low."""

    def check(value: Any) -> Any:
        for number in value if isinstance(value, tuple) else [value]:
            if not low <= number <= high or (above and number == low):
                least = f"above {low:g}" if above else f"{low:g} or more"
                most = "" if high == math.inf else f", {high:g} or less"
                raise ConfigError(f"{number:g}: must be {least}{most}")
        return value

    return AfterValidator(check)


def of_layer(given: float | tuple[float, ...], slot: int, num_layers: int | None) -> float:
    """The number for one layer; ConfigError for a list of another length (None: not known)."""
    if not isinstance(given, tuple):
        return float(given)
    if len(given) != num_layers and (num_layers is not None or slot >= len(given)):
        raise ConfigError(
            f"{len(given)} values for {num_layers or 'more'} MoE layers; give one for each, or a "
            "single one for all"
        )
    return float(given[slot])
