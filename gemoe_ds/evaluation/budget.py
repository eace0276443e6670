"""A budget of experts, met after training: the dial of the routers, moved until the mean k fits.

Works for every router that declares a `dial`, whatever it was trained for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import Router
from gemoe_ds.registry import ConfigModel

TOLERANCE = 0.005  # of the target, on the calibration samples: where the search stops
MOST_OFF = 0.02  # the same: where it has failed
MOST_PASSES = 15  # twice as many where every layer has its own target
FACTOR = "k_scale"  # what `--rescale` moves in the place of the dial


@dataclass(frozen=True)
class Budget:
    """What was found: put the options into a recipe's `model.router`."""

    mean_k: float  # on the calibration samples
    options: dict[str, tuple[float, ...]]  # of every layer a value
    passes: int  # over the calibration samples

    def __str__(self) -> str:
        """The options, as a command line takes them."""
        return " ".join(f"model.router.{name}={text}" for name, text in self._texts().items())

    def options_of_router(self, router: type[Router], config: ConfigModel) -> str:
        """The same for one of --router, with what else it was given."""
        given = config.model_dump(mode="json", exclude_unset=True)
        texts = {name: json.dumps(value) for name, value in given.items()} | self._texts()
        told = "".join(f", {name}: {text}" for name, text in texts.items())
        return f"--router '{{name: {router.name}{told}}}'"

    def _texts(self) -> dict[str, str]:
        found = {}
        for option, values in self.options.items():
            texts = [f"{value:.6g}" for value in values]
            found[option] = texts[0] if len(set(values)) == 1 else f"[{','.join(texts)}]"
        return found

    def apply(self, routers: Sequence[Router]) -> None:
        for option, values in self.options.items():
            for router, value in zip(routers, values, strict=True):
                setattr(router, option, value)


def check_dial(router: type[Router], *, rescale: bool = False) -> None:
    """ConfigError for a router that has no number to move."""
    if router.dial is None:
        able = ", ".join(known.name for known in Router.known() if known.dial)
        raise ConfigError(
            f"router {router.name!r} has no number that moves its mean k; --mean-k works for {able}"
        )
    if rescale and FACTOR not in router.Config.model_fields:
        raise ConfigError(f"router {router.name!r} has no {FACTOR}; leave --rescale out")


def range_of_k(router: Router, target: float) -> tuple[int, int]:
    """The smallest and the largest k; ConfigError if the target is not between them."""
    low_k, high_k = router.min_k, router.max_k
    if not low_k < target < high_k:
        raise ConfigError(
            f"--mean-k {target:g} cannot be met: k goes from {low_k} to {high_k} "
            "(model.router.k_low and k_high)"
        )
    return low_k, high_k


def fit_budget_to(
    routers: Sequence[Router],
    target: float | Sequence[float],
    measure: Callable[[], Sequence[float]],
    *,
    rescale: bool = False,
) -> Budget:
    """Set the dial of all routers so that the mean of `measure()`, their mean k, is `target`.

    One number for the whole model: the layers keep their differences, and tokens their order. With
    a target for every layer each meets its own, by a number of its own. What the recipe or an
    earlier budget has set is forgotten. `rescale` moves `k_scale`. Raises ConfigError for a target
    that is out of reach, or missed by more than 2 %.
    """
    for router in routers:
        check_dial(type(router), rescale=rescale)
    if isinstance(target, float | int):
        searches, most_passes = [_Search(routers, slice(None), target, rescale)], MOST_PASSES
    else:
        searches = [
            _Search(routers, slice(layer, layer + 1), goal, rescale)
            for layer, goal in enumerate(target)
        ]
        most_passes = 2 * MOST_PASSES
    best: tuple[float, list[tuple[float, float]]] | None = None  # the worst miss; values, mean ks
    passes = 0
    while passes < most_passes and (best is None or best[0] > TOLERANCE):
        passes += 1
        for search in searches:
            search.put(search.value)
        k_L = measure()
        found = [(search.value, search.mean(k_L)) for search in searches]
        worst = max(search.learn(k) for search, (_, k) in zip(searches, found, strict=True))
        if best is None or worst < best[0]:
            best = worst, found
    assert best is not None
    for search, (value, k) in zip(searches, best[1], strict=True):
        search.put(value)
        search.check(k, passes)
    names = [name for name in (FACTOR, routers[0].dial) if name and hasattr(routers[0], name)]
    options = {name: tuple(float(getattr(router, name)) for router in routers) for name in names}
    return Budget(sum(k for _, k in best[1]) / len(searches), options, passes)


class _Search:
    """For the one value of some layers. Between two values that bracket the target the next is
    where a straight line would meet it (Illinois). k is whole: none need give the target exactly.
    """

    def __init__(
        self, routers: Sequence[Router], layers: slice, target: float, rescale: bool
    ) -> None:
        self.routers, self.layers, self.target = routers[layers], layers, target
        first = self.routers[0]
        self.option, other = (FACTOR, first.dial) if rescale else (str(first.dial), FACTOR)
        low_k, high_k = range_of_k(first, target)
        for router in self.routers:
            if hasattr(router, str(other)):
                setattr(router, str(other), router.Config.model_fields[str(other)].default)
        self.ends = (0.0, 2 * high_k / max(low_k, 0.5)) if rescale else first.dial_ends
        self.low, self.high = self.ends
        self.below, self.above = low_k - target, high_k - target
        self.last_side, self.in_a_row = 0, 1
        self.value = self._next()

    def put(self, value: float) -> None:
        for router in self.routers:
            setattr(router, self.option, value)

    def mean(self, k_L: Sequence[float]) -> float:
        mine = k_L[self.layers]
        return float(sum(mine)) / len(mine)

    def learn(self, mean_k: float) -> float:
        """How far off the value is, as a share of the target. One that fits stays."""
        off = mean_k - self.target
        if abs(off) <= TOLERANCE * self.target:
            return abs(off) / self.target
        side = 1 if off > 0 else -1
        self.in_a_row = self.in_a_row + 1 if side == self.last_side else 1
        if off > 0:
            self.high, self.above = self.value, off
            self.below /= 2 if side == self.last_side else 1
        else:
            self.low, self.below = self.value, off
            self.above /= 2 if side == self.last_side else 1
        if self.in_a_row > 2 and self.layers != slice(None):
            self._widen()
        self.last_side = side
        self.value = self._next()
        return abs(off) / self.target

    def _widen(self) -> None:
        """For a layer: those below move its mean k too, and the target may have left the bracket.
        The end that was not tried lately is taken further away, with a guess at what it gives."""
        width = 4 * (self.high - self.low)
        least, most = sorted(self.ends)
        if self.value == self.high:
            self.low, self.below = min(max(self.high - width, least), most), -self.above
        else:
            self.high, self.above = min(max(self.low + width, least), most), -self.below

    def check(self, mean_k: float, passes: int) -> None:
        """ConfigError if the target is missed by too much."""
        if abs(mean_k - self.target) <= MOST_OFF * self.target:
            return
        other = ""
        if hasattr(self.routers[0], FACTOR):
            other = "try no --rescale, " if self.option == FACTOR else "try --rescale, "
        raise ConfigError(
            f"--mean-k {self.target:g} is not met: {mean_k:.3g} is the nearest in {passes} "
            f"passes, more than {MOST_OFF:.0%} off, as many tokens change their k at once; ask "
            f"for {mean_k:.3g}, {other}or more --calibration-samples"
        )

    def _next(self) -> float:
        return self.low - self.below * (self.high - self.low) / (self.above - self.below)
