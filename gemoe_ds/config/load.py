"""YAML recipe + `key.path=value` overrides -> RunConfig; every mistake becomes one clear line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gemoe_ds.config.choices import Choice
from gemoe_ds.config.old_names import with_new_names
from gemoe_ds.config.paths import RECIPE, Places
from gemoe_ds.config.schema import RunConfig
from gemoe_ds.errors import ConfigError

_SHOWN_ERRORS = 3


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply the overrides in order, validate.

    A recipe may start from another one with `extends: other.yaml` (one level). Mappings merge key
    by key; where `name` changes, the options of the old name are dropped. What it reads is looked
    for in the working directory, beside the recipe (and what that extends), and in the package.
    Raises ConfigError: unreadable file, unknown key, missing key, wrong type or range.
    """
    tree, files = _read(path)
    return config_from_dict(_with_overrides(tree, overrides)).located(Places.beside(*files))


def config_from_dict(tree: dict[str, Any]) -> RunConfig:
    """Validate a plain dict; raises ConfigError with the path of each bad key, on one line."""
    try:
        return RunConfig.model_validate(with_new_names(tree))
    except ValidationError as error:
        details = error.errors(include_url=False)
        lines = [_explain(detail, tree) for detail in details[:_SHOWN_ERRORS]]
        if len(details) > _SHOWN_ERRORS:
            lines.append(f"and {len(details) - _SHOWN_ERRORS} more")
        raise ConfigError("; ".join(lines)) from None


def as_config(
    given: RunConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()
) -> RunConfig:
    """The configuration that Python code means: itself, as a dict, or a recipe by path or name.

    Overrides are `key.path=value`, of a configuration as of a recipe. Raises ConfigError.
    """
    if isinstance(given, (str, Path)):
        return load_config(given, overrides)
    if isinstance(given, RunConfig):
        if not overrides:
            return given
        given = given.model_dump(mode="json")
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"a configuration is a RunConfig, a dict, or the path or name of a recipe; got "
            f"{type(given).__name__}"
        )
    return config_from_dict(_with_overrides(dict(given), overrides)).located(Places.beside())


def read_recipe(path: Path) -> dict[str, Any]:
    """The plain dict of a recipe file, with what it extends merged under it."""
    return _read(path)[0]


def _read(path: str | Path) -> tuple[dict[str, Any], list[Path]]:
    """The dict of `read_recipe`, and the files that it is from."""
    if not str(path).strip():
        raise ConfigError("the recipe is an empty text; give a path, or a name: olmoe_gemoe_8_gpus")
    path = Places.beside().locate("", str(path), RECIPE)
    tree = _read_yaml(path)
    if "extends" not in tree:
        return tree, [path]
    base = tree.pop("extends")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends must be the path of a recipe, got {base!r}")
    base_path = Places.beside(path).locate(f"{path}: extends", base, RECIPE)
    base_tree = _read_yaml(base_path)
    if "extends" in base_tree:
        raise ConfigError(
            f"{path}: extends {base}, which itself extends {base_tree['extends']}; one level is "
            "the rule, so extend that one, or a copy of what --print-config prints"
        )
    return _merged(base_tree, tree), [path, base_path]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8-sig"), f"{path}: not valid YAML")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this recipe: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is no text in UTF-8; give a YAML file, saved so") from None
    if tree is None:
        raise ConfigError(f"{path}: is empty; gemoe_ds/recipes/ has some to start from")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of options, got {tree!r:.40}")
    return dict(with_new_names(tree))


def parse_yaml(text: str, said: str) -> Any:
    """What it says; ConfigError for what is none, and for placeholders that nobody fills in."""
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{said}: {_one_line(error)}") from None
    except RecursionError:
        raise ConfigError(f"{said}: nested too deep") from None
    except ValueError as error:  # `!!int abc`, a number of thousands of digits
        raise ConfigError(f"{said}: {str(error).partition(';')[0]}; write it plainly") from None
    return tree


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`, recursively; another `name` takes none of the old one's options."""
    if "name" in base and top.get("name", base["name"]) != base["name"]:
        return dict(top)
    merged = dict(base)
    for key, value in top.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            value = _merged(below, value)
        merged[key] = value
    return merged


def _with_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    # Merged among themselves first: a name and its options may come in either order.
    changes: dict[str, Any] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.split(".")
        if not equals or not all(keys) or any(key != key.strip() for key in keys):
            raise ConfigError(
                f"override {override!r}: write it as key.path=value, without spaces around ="
            )
        if not text.strip():
            raise ConfigError(
                f"override {override!r}: has no value; write it after the = without a space, or "
                f"{dotted}=null"
            )
        value = parse_yaml(text, f"override {override!r}: not a YAML value")
        nested: Any = value
        for key in reversed(keys):
            nested = {key: nested}
        changes = _merged(changes, nested)
    return _merged(tree, with_new_names(changes))


def _explain(detail: ErrorDetails, tree: Mapping[str, Any]) -> str:
    """One pydantic error as `path: what is wrong; what would be right`."""
    keys = [str(key) for key in detail["loc"]]
    path = ".".join(keys)
    if detail["type"] == "extra_forbidden":
        owner, valid = _options_at(keys[:-1], tree)
        near = difflib.get_close_matches(keys[-1], valid, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        if "." in keys[-1]:
            hint = " (a dotted path is for the command line; nest the mappings in a recipe)"
        return f"{path}: no such option; {owner} has {', '.join(valid)}{hint}"
    if detail["type"] == "missing":
        return f"{path}: missing; set it in the recipe or as {path}=VALUE"
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # ours; one about several keys names them already
        names_keys = not path or str(cause).startswith(f"{path}.")
        return str(cause) if names_keys else f"{path}: {cause}"
    return f"{path}={_shown(detail['input'])}: should {_expected(detail, keys, tree)}"


def _expected(detail: ErrorDetails, keys: Sequence[str], tree: Mapping[str, Any]) -> str:
    """What pydantic wants there, in a recipe's words."""
    kind, said = detail["type"], detail["msg"].removeprefix("Input ").removeprefix("should ")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        owner, valid = _options_at(keys, tree)
        return f"be a mapping of options; {owner} has {', '.join(valid)}"
    words = {
        "string_type": "be text; quote it if it looks like something else",
        "tuple_type": "be a list, such as [0.9, 0.999] or [my_module:MyHook]",
        "too_long": f"be a list of {detail.get('ctx', {}).get('max_length')}",
        "int_parsing": "be a whole number",
        "int_type": "be a whole number",
        "int_from_float": "be a whole number",
        "int_parsing_size": "be a smaller number",
        "float_parsing": "be a number",
        "float_type": "be a number",
        "bool_parsing": "be true or false",
        "bool_type": "be true or false",
    }
    return words.get(kind, said)


def _shown(value: Any) -> str:
    """As a recipe has it: null, true, quoted text."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # a mapping that holds itself
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _options_at(keys: Sequence[str], tree: Mapping[str, Any]) -> tuple[str, list[str]]:
    """What to call the mapping at this path, and the options that it has."""
    model: type[BaseModel] = RunConfig
    owner, node = "a recipe", tree
    for depth, key in enumerate(keys):
        node = node[key]
        model = _model_in(model.model_fields[key].annotation)
        owner = ".".join(keys[: depth + 1])
        if issubclass(model, Choice):
            owner = node["name"]
            model = model.family.named(owner).Config
    return owner, list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel]:
    """The options class of a field: `M`, or the M of `M | None`."""
    classes = [annotation, *get_args(annotation)]
    return next(c for c in classes if isinstance(c, type) and issubclass(c, BaseModel))


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its traps: `1e-4` is a number, a date is text, `010` and `1:30` are
    refused, a key is text and stands only once, and `${...}` or `$HOME` is not taken for text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str) or key_node.tag.rpartition(":")[2] not in ("str", "merge"):
                what = repr(key) if isinstance(key, str) else "a list or mapping"
                _refuse(key_node, f"a key is the name of an option, and {what} is none")
            if key in seen:
                _refuse(key_node, f"key {key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_plain_int(self, node: yaml.ScalarNode) -> int:
        if ":" in node.value or re.match(r"[-+]?0[0-9_]", node.value):
            _refuse(node, f"{node.value} is another number in YAML; write a decimal one, or quote")
        return self.construct_yaml_int(node)

    def construct_literal(self, node: yaml.ScalarNode) -> str:
        if re.search(r"\$[A-Za-z{]", node.value):
            _refuse(node, f"{node.value} is not filled in here; write the value itself")
        return self.construct_yaml_str(node)


def _refuse(node: yaml.Node, problem: str) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_plain_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_literal)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)
