"""What is checked of a run before any weight is read."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from gemoe_ds.config import (
    validate_evaluation,
    validate_run,
)
from gemoe_ds.errors import ConfigError
from tests.config.deepspeed_files import loaded
from tests.config.minimal import load


def test_one_validation_for_training_and_one_for_evaluation(tmp_path: Path) -> None:
    config = loaded(tmp_path, {"gradient_clipping": 0.5}, "parallel.ep_size=1")
    for name in ("train", "tokenizer", "base"):
        (tmp_path / name).mkdir()
    here = [f"data.{n}={tmp_path}/{n}" for n in ("train", "tokenizer")]
    here.append(f"model.checkpoint={tmp_path}/base")
    config = loaded(tmp_path, {"gradient_clipping": 0.5}, *here)
    for check in (lambda: validate_run(config, 2), lambda: validate_evaluation(config)):
        with pytest.raises(ConfigError, match="gradient_clipping=0.5 contradicts"):
            check()
    config = loaded(tmp_path, {"train_batch_size": 64}, *here)  # as on the ranks it trained on
    validate_evaluation(config)
    with pytest.raises(ConfigError, match="train_batch_size=64 contradicts"):
        validate_run(config, 2)


def test_a_long_file_in_base64_is_checked_too(tmp_path: Path) -> None:
    content = {"gradient_clipping": 0.5, "_why": "x" * 300}  # a path may have 255 characters
    text = base64.urlsafe_b64encode(json.dumps(content).encode()).decode()
    for name in ("tokenizer", "base"):
        (tmp_path / name).mkdir()
    paths = [f"data.tokenizer={tmp_path}/tokenizer", f"model.checkpoint={tmp_path}/base"]
    with pytest.raises(ConfigError, match="gradient_clipping=0.5 contradicts"):
        validate_evaluation(loaded(tmp_path, {}, f"deepspeed={text}", *paths))


@pytest.mark.parametrize("router", ["ada_k", "evolve", "remoe"])
def test_a_gate_without_a_dense_gradient_is_refused(recipe: Path, router: str) -> None:
    change = f"model.router={{name: {router}}}"
    config = load(recipe, change, "model.trainable=experts")
    validate_run(config, 1, inputs_are_here=False)
    config = load(recipe, change, "model.trainable=experts", "model.gate_gradient=dense")
    with pytest.raises(ConfigError, match=f"router '{router}' has no gradient of experts"):
        validate_run(config, 1, inputs_are_here=False)


def test_a_router_that_trains_experts_wants_them_to_train(recipe: Path) -> None:
    config = load(recipe, "model.router={name: evolve}")
    with pytest.raises(ConfigError, match="'evolve' trains experts.*set model.trainable=experts"):
        validate_run(config, 1, inputs_are_here=False)
