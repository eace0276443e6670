"""Options of a server: `--additional-config '{"gemoe": {"slots": "fold", "k_shift": -1}}'`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemoe_vllm._gemoe.errors import ConfigError

FOLD, ZERO, RAGGED, PADDING = "fold", "zero", "ragged", "padding_not_run_on_a_gpu"

# What stands in a slot that a token does not use; a token has as many slots as its largest k.
SLOTS = {
    FOLD: "the token's best expert once more, with weight 0: no further expert's weights are read",
    ZERO: "the expert that would be next, with weight 0: saves nothing, for comparison",
    RAGGED: "nothing, the row is left out (CPU only)",
    PADDING: "an expert that does not exist, whose rows the kernel skips (CUDA; NOT RUN ON A GPU)",
}


@dataclass(frozen=True)
class Options:
    """`slots`, and the options of the router that this server changes, by name."""

    slots: str = FOLD
    router: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, additional_config: Any) -> Options:
        """From `--additional-config`; ConfigError for what is no mapping, or no known slots."""
        given = additional_config.get("gemoe", {}) if isinstance(additional_config, dict) else {}
        if not isinstance(given, dict):
            raise ConfigError(
                f"--additional-config: gemoe is {given!r:.60}; give a mapping such as "
                '{"gemoe": {"slots": "fold"}}'
            )
        slots = given.get("slots", FOLD)
        if slots not in SLOTS:
            known = ", ".join(SLOTS)
            raise ConfigError(
                f"--additional-config: gemoe.slots={slots!r:.60}; give one of {known}"
            )
        return cls(slots, {name: value for name, value in given.items() if name != "slots"})
