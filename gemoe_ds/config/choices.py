"""A registered class, chosen by name, with its own options: what stands in a recipe for it."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import SerializeAsAny, model_serializer, model_validator

import gemoe_ds.models
import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.errors import ConfigError
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.moe.router import Router
from gemoe_ds.registry import ConfigModel, Registered


class Choice(ConfigModel):
    """A registered class by name, with its own options: `{name: gemoe, k_high: 8}` in YAML."""

    family: ClassVar[type[Registered]]

    name: str
    config: SerializeAsAny[ConfigModel]

    @model_validator(mode="before")
    @classmethod
    def _decode(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            known = ", ".join(cls.family.names())
            raise ConfigError(f"needs a mapping with a name; known names: {known}")
        options = {key: option for key, option in value.items() if key != "name"}
        chosen = cls.family.named(value["name"])
        return {"name": value["name"], "config": chosen.Config.model_validate(options)}

    @model_serializer
    def _encode(self) -> dict[str, Any]:
        return self.flat()

    def flat(self, *, only_set: bool = False) -> dict[str, Any]:
        """Name and options side by side, as in a recipe; `only_set`: without defaulted ones."""
        return {"name": self.name} | self.config.model_dump(mode="json", exclude_unset=only_set)


class RouterChoice(Choice):
    family: ClassVar[type[Registered]] = Router

    @property
    def router_class(self) -> type[Router]:
        return Router.named(self.name)


class BackboneChoice(Choice):
    family: ClassVar[type[Registered]] = Backbone

    @property
    def backbone_class(self) -> type[Backbone]:
        return Backbone.named(self.name)
