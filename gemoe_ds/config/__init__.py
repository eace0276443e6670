"""RunConfig: a YAML recipe plus `key.path=value` becomes one strict, typed, frozen tree."""

from gemoe_ds.config.choices import BackboneChoice, RouterChoice
from gemoe_ds.config.cli_help import Flags, parse_cli
from gemoe_ds.config.deepspeed import deepspeed_config
from gemoe_ds.config.load import load_config
from gemoe_ds.config.schema import OptimConfig, RunConfig
from gemoe_ds.config.validate import validate_evaluation, validate_run

__all__ = [
    "BackboneChoice",
    "Flags",
    "OptimConfig",
    "RouterChoice",
    "RunConfig",
    "deepspeed_config",
    "load_config",
    "parse_cli",
    "validate_evaluation",
    "validate_run",
]
