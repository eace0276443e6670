"""What a run that goes on does otherwise than before, and every recipe that it has had.

What an evaluation of it does otherwise, too.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import yaml

from gemoe_ds.checkpoint.manifest import Checkpoint
from gemoe_ds.config import RunConfig
from gemoe_ds.config.old_names import with_new_names
from gemoe_ds.errors import as_written

FILE = "config.yaml"  # of a run, the newest; load_config reads it
_WHERE = ("resume", "start_from", "output_dir")  # not what is trained
_DEEPSPEED = "DeepSpeed's file"  # what is in it
_MISSING = "not set"


def described(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint says of the recipe that made it, for `changes`."""
    recipe = config.model_dump(mode="json", exclude=set(_WHERE))
    return recipe | {_DEEPSPEED: config.deepspeed_file.options}


def changes(found: Checkpoint, config: RunConfig, num_ranks: int) -> str:
    """A line for each option that differs from those of the checkpoint; "" if none does.

    An option that the version of then did not have differs only if it is set now.
    """
    recipe, new = _recipe_of(found), described(config)
    if not recipe:  # nothing is known of it
        return ""
    if _DEEPSPEED not in recipe:  # of an older version
        del new[_DEEPSPEED]
    before = found.manifest.get("written by", {}).get("ranks", num_ranks)
    old, new = _flat(recipe | {"ranks": before}), _flat(new | {"ranks": num_ranks})
    given = _flat(config.model_dump(mode="json", exclude_unset=True)) | {"ranks": num_ranks}
    asked = [key for key in new if key in given or key.startswith(_DEEPSPEED)]
    return _table(f"the recipe has changed since step {found.step}:", old, new, asked)


def model_changes(found: Checkpoint, config: RunConfig) -> str:
    """A line for each option of the model, its router's too, that is not the checkpoint's; "" if
    none differs. What its folders hold is not compared."""
    recipe = _recipe_of(found)
    if not isinstance(recipe.get("model"), dict):
        return ""
    old = _flat({"model": recipe["model"]})
    new = _flat({"model": config.model.model_dump(mode="json")})
    given = _flat({"model": config.model.model_dump(mode="json", exclude_unset=True)})
    return _table(f"the model is not as it was trained in {found.folder}:", old, new, given)


def recipe_of(found: Checkpoint) -> dict[str, Any]:
    """What a checkpoint says of its recipe, by dotted names; {} for one of an older version."""
    return _flat(_recipe_of(found))


def _table(title: str, old: dict[str, Any], new: dict[str, Any], given: Container[str]) -> str:
    """What differs; what the version of then did not have counts only if it is in `given`."""
    known = [key for key in new if key in old or key in given]
    keys = [k for k in (*known, *sorted(old.keys() - new.keys())) if old.get(k) != new.get(k)]
    pairs = [(k, *(as_written(side.get(k, _MISSING)) for side in (old, new))) for k in keys]
    rows = [f"  {key:<34} {was} -> {now}" for key, was, now in pairs]
    return "\n".join([title, *rows]) if rows else ""


def keep_recipes(output: Path, config: RunConfig, start_step: int) -> None:
    """Write config.yaml; another one that was there stays, named by the last step that it had."""
    path, text = output / FILE, config.dump_yaml()
    if path.exists() and _without_where(path.read_text(encoding="utf-8")) != _without_where(text):
        kept = output / f"config-until-step-{start_step:06d}.yaml"
        number = 1
        while kept.exists():
            number += 1
            kept = output / f"config-until-step-{start_step:06d}-{number}.yaml"
        path.rename(kept)
    path.write_text(text, encoding="utf-8")


def _recipe_of(found: Checkpoint) -> dict[str, Any]:
    """As the checkpoint has it; for one of an older version, the file beside its folder."""
    recipe = found.manifest.get("recipe")
    if recipe is None:
        recipe = _without_where(_read(found.folder.parent.parent / FILE))
    return with_new_names(recipe, warn=False) if isinstance(recipe, dict) else {}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _without_where(text: str) -> Any:
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if not isinstance(recipe, dict):
        return recipe
    new = with_new_names(recipe, warn=False)
    return {key: value for key, value in new.items() if key not in _WHERE}


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested options by their dotted path."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{above}{key}"
        found |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found
