"""Without the harnesses, or with others, one line says how to get them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.benchmarks import harnesses


def test_they_are_installed_as_pinned() -> None:
    harnesses.check_installed()
    assert len(harnesses.pins()) == 32
    assert harnesses.label("lmms_eval") == "lmms_eval 0.7.3"


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ("lm_eval==0.4.13 no-such-a==1 no-such-b==2", "needs no-such-a, no-such-b, which are not"),
        ("lm_eval==0.4.12", "lm_eval 0.4.13 is installed, and .* works with 0.4.12 alone"),
    ],
)
def test_what_is_missing_or_other(
    pins: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pins.txt"
    path.write_text(pins)
    monkeypatch.setattr(harnesses, "REQUIREMENTS", path)
    with pytest.raises(ConfigError, match=f"{message}.*make eval-env.*--no-deps"):
        harnesses.check_installed()


def test_loading_has_seeds_of_its_own_and_leaves_others_alone() -> None:
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    drawn = []
    for _ in range(2):
        with harnesses.quiet_and_seeded():
            drawn.append((random.random(), np.random.random()))
    assert drawn[0] == drawn[1]
    assert (random.random(), np.random.random()) == expected
