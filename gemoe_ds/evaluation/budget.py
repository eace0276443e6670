"""A budget of experts, met after training: one number of the model moved until its mean k fits.

Works for every router that has `k_shift` and `k_scale` (GeMoE's), whatever it was trained for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import Router

TOLERANCE = 0.005  # of the target, on the calibration samples: where the search stops
MOST_OFF = 0.02  # the same: where it has failed
MOST_PASSES = 15


@dataclass(frozen=True)
class Budget:
    """What was found: put `k_scale` and `k_shift` into a recipe's `model.router`."""

    mean_k: float  # on the calibration samples
    k_scale: float
    k_shift: float
    passes: int  # over the calibration samples


def fit_budget_to(
    routers: list[Router],
    target: float,
    measure: Callable[[], float],
    how: Literal["shift", "scale"] = "shift",
) -> Budget:
    """Set `k_shift` (or `k_scale`) of all routers so that `measure()`, their mean k, is `target`.

    One number for the whole model: the layers keep their differences, and tokens their order.
    Between two values that bracket the target the next one is where a straight line would meet it
    (Illinois); k is rounded, so that no value need give the target exactly. What the recipe or an
    earlier budget has set is forgotten. Raises ConfigError for a target that is out of reach, or
    missed by more than 2 %.
    """
    low_k, high_k = _range_of_k(routers, target)
    for router in routers:
        router.k_scale, router.k_shift = 1.0, 0.0  # type: ignore[assignment]
    width = high_k - low_k
    # At these two every token gets the smallest k, or the largest.
    ends = (-width - 1, width + 1) if how == "shift" else (0.0, 2 * high_k / max(low_k, 0.5))

    def put(value: float) -> None:
        for router in routers:
            setattr(router, f"k_{how}", value)

    def off_at(value: float) -> float:
        put(value)
        return measure() - target

    value, off, passes = _nearest(off_at, ends, (low_k - target, high_k - target), target)
    put(value)
    reached = target + off
    if abs(off) > MOST_OFF * target:
        other = "--rescale" if how == "shift" else "no --rescale"
        raise ConfigError(
            f"--mean-k {target:g} is not met: {reached:.3g} is the nearest in {passes} passes, "
            f"more than {MOST_OFF:.0%} off, as the predicted k hardly differ; ask for "
            f"{reached:.3g}, try {other}, or more --calibration-samples"
        )
    first = routers[0]
    return Budget(reached, first.k_scale, first.k_shift, passes)  # type: ignore[arg-type]


def _range_of_k(routers: list[Router], target: float) -> tuple[float, float]:
    """The smallest and the largest mean k; ConfigError if the target is not between them."""
    for router in routers:
        if not hasattr(router, "k_shift"):
            raise ConfigError(
                f"router {router.name!r} predicts no k that a budget could move; --mean-k works "
                "for gemoe"
            )
    low_k = sum(router.k_low for router in routers) / len(routers)  # type: ignore[misc]
    high_k = sum(router.k_high for router in routers) / len(routers)  # type: ignore[misc]
    if not low_k < target < high_k:
        raise ConfigError(
            f"--mean-k {target:g} cannot be met: k goes from {low_k:g} to {high_k:g} "
            "(model.router.k_low and k_high)"
        )
    return low_k, high_k


def _nearest(
    off_at: Callable[[float], float],
    ends: tuple[float, float],
    off_at_ends: tuple[float, float],
    target: float,
) -> tuple[float, float, int]:
    """The value found at which the mean k is the least off, by how much, and passes taken."""
    (low, high), (below, above) = ends, off_at_ends
    best: tuple[float, float] | None = None
    last_side = passes = 0
    while passes < MOST_PASSES:
        passes += 1
        value = low - below * (high - low) / (above - below)
        off = off_at(value)
        if best is None or abs(off) < abs(best[1]):
            best = value, off
        if abs(off) <= TOLERANCE * target:
            break
        side = 1 if off > 0 else -1
        if off > 0:
            high, above = value, off
            below /= 2 if side == last_side else 1
        else:
            low, below = value, off
            above /= 2 if side == last_side else 1
        last_side = side
    assert best is not None
    return *best, passes
