"""Mistakes on a command line are one line and exit code 2, with the way out."""

from __future__ import annotations

import pytest

from gemoe_ds.errors import ConfigError
from gemoe_ds.parser import Parser, at_least_one


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train.steps", "30"], "is written train.steps="),
        (["--train.steps=30"], "is written train.steps=30"),
        (["--rank", "3"], "did you mean --ranks?"),
        (["--deepspeed", "x"], "is written key.path=value"),
        (["--ranks", "0"], "0 is not a number from 1"),
        (["--ranks", "9" * 5000], "is not a number from 1"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--ranks", type=at_least_one)
    with pytest.raises(ConfigError, match=".") as refused:
        parser.parse_intermixed_args(words)
    assert said in str(refused.value)
    with pytest.raises(SystemExit) as left:
        parser.parse_or_exit(words)
    printed = capsys.readouterr()
    assert left.value.code == 2 and not printed.out and printed.err.count("\n") == 1
