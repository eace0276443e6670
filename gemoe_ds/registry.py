"""Name -> class, filled by subclassing: a new router is one file and no list to edit."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from gemoe_ds.errors import ConfigError

R = TypeVar("R", bound="Registered")


_MOST = 2**53


def _plain_types(annotation: Any) -> set[Any]:
    """int, float, bool, str and None in `Annotated[int, ...] | None`."""
    inner = get_args(annotation)
    return set().union(*map(_plain_types, inner)) if inner else {annotation} & _PLAIN


_PLAIN = {int, float, bool, str, NoneType}


class ConfigModel(BaseModel):
    """Base of every options class: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """A bool (`yes` is one in YAML) is no number, and none here needs more than 53 bits; what
        may be null is not `None`, which is a text in YAML."""
        kinds = _plain_types(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and kinds and bool not in kinds and kinds & {int, float}:
            raise ConfigError(
                f"{str(value).lower()} is no number (yes, no, on, off are words for "
                "true and false in YAML); give a number" + ", or null" * (NoneType in kinds)
            )
        if value == "None" and NoneType in kinds:
            raise ConfigError("None is a text in YAML; null says that there is none")
        if isinstance(value, int) and abs(value) > _MOST:
            raise ConfigError(f"{str(value)[:30]} is too large; {_MOST} is the most")
        return value


@dataclass(frozen=True)
class Reads:
    """Marks an option that names a file or folder that a run reads: `Annotated[str, Reads()]`.

    `of_hub`: what is read from it, where the name of a model of the Hugging Face Hub may stand in
    the folder's place. `words`: values that are no paths. `shipped`: the folder of the package that
    holds some, which a name such as `zero2` stands for.
    """

    of_hub: Literal["", "model", "tokenizer"] = ""
    words: tuple[str, ...] = ()
    shipped: Literal["", "recipes", "ds_configs", "slurm"] = ""


class Registered:
    """Base of a family of named classes.

    A direct subclass (`Router`, `Backbone`) opens a family. A class below it that sets `name`
    joins that family and nests its options as `Config`.
    """

    name: ClassVar[str]
    _family: ClassVar[dict[str, type[Any]]]
    Config: ClassVar[type[ConfigModel]] = ConfigModel  # options; subclasses nest their own

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Registered in cls.__bases__:
            cls._family = {}
        elif "name" in cls.__dict__:
            known = cls._family.get(cls.name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise TypeError(
                    f"{cls.name!r} names both {known.__qualname__} and {cls.__qualname__}"
                )
            cls._family[cls.name] = cls

    @classmethod
    def names(cls) -> list[str]:
        """The registered names of this family, sorted."""
        return sorted(cls._family)

    @classmethod
    def known(cls: type[R]) -> list[type[R]]:
        """The classes of this family, by the order of their names."""
        return [cls._family[name] for name in cls.names()]

    @classmethod
    def named(cls: type[R], name: str) -> type[R]:
        """The class registered under `name`; raises ConfigError listing the known ones."""
        try:
            return cls._family[name]
        except KeyError:
            known, near = ", ".join(cls.names()), difflib.get_close_matches(name, cls.names(), n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(
                f"{cls._called()} {name!r} is not known; known: {known}{hint}"
            ) from None

    @classmethod
    def _called(cls) -> str:
        """The family in plain words: router, prompt style."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__).lower()

    @classmethod
    def configured(
        cls: type[R], chosen: str | type[R], options: Mapping[str, Any]
    ) -> tuple[type[R], ConfigModel]:
        """A class, by its name or itself, and its options; ConfigError for those that it lacks."""
        found = cls.named(chosen) if isinstance(chosen, str) else chosen
        if not (isinstance(found, type) and issubclass(found, cls)):
            raise ConfigError(
                f"{chosen!r:.60} is no {cls.__name__.lower()}; give a name "
                f"({', '.join(cls.names())}) or a class below {cls.__name__}"
            )
        family, valid = cls.__name__.lower(), list(found.Config.model_fields)
        for name in options:
            if name not in valid:
                near = difflib.get_close_matches(name, valid, n=1)
                raise ConfigError(
                    f"{name}: no such option; {family} {found.name} has {', '.join(valid)}"
                    + (f" (did you mean {near[0]}?)" if near else "")
                )
        try:
            return found, found.Config(**options)
        except ValidationError as error:
            said = "; ".join(
                f"{'.'.join(map(str, detail['loc']))}={detail['input']!r:.40}: {detail['msg']}"
                for detail in error.errors(include_url=False)
            )
            raise ConfigError(f"{family} {found.name}: {said}") from None


def import_all(package: str, path: list[str]) -> None:
    """Import every module of a package, so that its classes register themselves."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
