"""What competes: the rows of a grid file, what sets their k, and how their settings are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

import gemoe_ds.routers  # noqa: F401  # every router has its name
from gemoe_ds.config.load import load_config
from gemoe_ds.errors import ConfigError
from gemoe_ds.moe.router import Router
from gemoe_ds.registry import ConfigModel

UNTOUCHED = "untouched"
Setting = dict[str, Any]  # key.path of the recipe: value


class Row(ConfigModel):
    """One method. Its k is set by a `knob` in training, or after it by its router's dial."""

    label: str
    router: dict[str, Any]
    knob: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(
        {}, description="one option and its values; or a name, and of every value the options"
    )
    gates: str = Field("", description="untouched, or ROW VALUE: the run whose gates it takes")
    settings: Setting = Field({}, description="options of the recipe that differ from it")
    trials: list[Setting] = Field([], description="settings to choose from on validation")
    trial: Any = Field(None, description="value of the knob in the trials; null: the middle one")
    captions: list[Any] = Field([], description="values that are trained on captions as well")
    quick: list[Any] = Field([], description="values of the quick contest")

    @model_validator(mode="after")
    def _agree(self) -> Row:
        name = self.router.get("name")
        if name not in Router.names():
            raise ValueError(f"router {name!r}: there are {', '.join(Router.names())}")
        if len(self.knob) > 1:
            raise ValueError("knob: one, not several")
        if not self.knob and Router.named(name).dial is None:
            raise ValueError(f"router {name!r} has no dial: name a knob that sets its k")
        if not self.trains and self.trials:
            raise ValueError("trials: nothing is trained that they could choose settings for")
        if unknown := [v for v in (*self.captions, *self.quick) if v not in self.values]:
            raise ValueError(f"captions and quick: {unknown} are not among {self.values}")
        return self

    @property
    def option(self) -> str | None:
        return next(iter(self.knob), None)

    @property
    def values(self) -> list[Any]:
        """Of the knob; a row with a dial has one training."""
        return list(next(iter(self.knob.values()), [None]))

    @property
    def trial_value(self) -> Any:
        return self.trial if self.trial is not None else self.values[len(self.values) // 2]

    @property
    def trains(self) -> bool:
        return not self.gates

    @property
    def is_static(self) -> bool:
        """The backbone as it is at fixed k."""
        return self.gates == UNTOUCHED and self.router["name"] == "top_k"

    def router_with(self, value: Any) -> dict[str, Any]:
        """The router's options with this value of the knob."""
        for option, values in self.knob.items():
            return self.router | (values[value] if isinstance(values, dict) else {option: value})
        return self.router


class Size(ConfigModel):
    """How much is run: the whole contest, or a quick one."""

    backbones: list[str]
    seeds: list[int]
    budgets: list[float] = Field(description="mean k that a dial is set to")
    captions: bool = Field(description="also train on captions only")
    steps: int
    split: Literal["test", "validation"] = Field(description="that is scored")
    samples: int | None = Field(None, description="of it, the first ones; null: all")
    calibration_samples: int


class Grid(ConfigModel):
    """A grid file."""

    recipe: str
    settings: Setting = Field({}, description="of all rows alike")
    backbones: dict[str, str] = Field(min_length=1, description="the first has all seeds")
    training: dict[Literal["mixed", "captions"], str]
    trial_sets: dict[str, list[Setting]] = Field({}, description="for the rows' YAML aliases")
    trials_each: int = Field(description="settings tried for every row that trains")
    trial_budget: float = Field(description="mean k at which rows with a dial are tried")
    development: dict[str, str] = Field(
        {}, description="how a row's method was made: what its trials do not count"
    )
    ours: str
    reference: str = Field(description="the row that others are measured against, beside ours")
    control: str = Field(description="ROW VALUE: retention is of its accuracy")
    full: Size
    quick: Size
    rows: dict[str, Row] = Field(min_length=1)

    @model_validator(mode="after")
    def _agree(self) -> Grid:
        for name in (self.ours, self.reference, *self.development):
            if name not in self.rows:
                raise ValueError(f"{name!r} is not among the rows: {', '.join(self.rows)}")
        self.training_of(self.control)
        for name, row in self.rows.items():
            if not name.replace("_", "a").isalnum() or name != name.lower():
                raise ValueError(f"row {name!r}: lower case letters, digits and _ only")
            if row.gates not in ("", UNTOUCHED):
                self.training_of(row.gates)
            if row.trains and len(row.trials) != self.trials_each:
                raise ValueError(
                    f"row {name} has {len(row.trials)} trials; every row that trains has "
                    f"{self.trials_each}, so that none is tuned longer"
                )
            if row.trains and self.training_of(f"{name} {row.trial_value}"):
                continue
        for size in (self.full, self.quick):
            if unknown := set(size.backbones) - set(self.backbones):
                raise ValueError(f"backbones {sorted(unknown)} are not among {[*self.backbones]}")
        return self

    def training_of(self, text: str) -> tuple[str, Any]:
        """A row and the value of its knob, said as `ROW VALUE` or `ROW`."""
        name, _, value = text.partition(" ")
        row = self.rows.get(name)
        found = [v for v in row.values if str(v) == (value or "None")] if row else []
        if not row or not row.trains or not found:
            raise ValueError(f"{text!r} names no training: a row that trains and a knob's value")
        return name, found[0]


def read_grid(path: Path) -> Grid:
    """ConfigError, one line, for what is no grid, or names options that a recipe has not."""
    try:
        grid = Grid.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"--grid {path}: {error.strerror}") from error
    except (UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--grid {path} is no YAML: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"--grid {path}: {where + ': ' if where else ''}{first['msg']}") from None
    for name, row in grid.rows.items():
        for setting in row.trials or [{}]:
            for value in row.values:
                try:
                    load_config(grid.recipe, overrides(grid, row, value, setting))
                except ConfigError as error:
                    raise ConfigError(f"--grid {path}: row {name}: {error}") from None
    return grid


def overrides(grid: Grid, row: Row, value: Any, setting: Setting) -> list[str]:
    """What a run of this row changes in the recipe, as a command line has it."""
    router = yaml.safe_dump(row.router_with(value), default_flow_style=True, width=10_000).strip()
    options = grid.settings | row.settings | setting
    return [f"model.router={router}", *(f"{key}={_written(v)}" for key, v in options.items())]


def _written(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).split("\n...")[0].strip()
