"""Options of evaluate.py and generate.py that cannot be are refused before anything is loaded."""

from __future__ import annotations

import pytest

from gemoe_ds.cli.submit import main as submit
from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.arguments import modes, session_parser


@pytest.mark.parametrize(
    "given, words",
    [
        (["--batch", "0"], "argument --batch: 0 is not a number from 1 to"),
        (["--k", "8", "0"], "argument --k: 0 is not a number from 1 to"),
        (["--k", "-1"], "argument --k: -1 is not a number from 1 to"),
        (["--out", __file__], "is a file; give a folder"),
    ],
)
def test_one_line_before_anything_is_loaded(given, words):
    argv = ["recipe.yaml", "--data", "d", "--out", "o", "--k", "4", *given]
    with pytest.raises(ConfigError, match=words):
        modes(session_parser(None).parse_intermixed_args(argv))


@pytest.mark.parametrize("given", ["--nodes=0", "--ranks-per-node=0", "--master-port=99999"])
def test_numbers_of_a_submission(given, capsys):
    with pytest.raises(SystemExit) as left:
        submit(["recipe.yaml", given])
    assert left.value.code == 2 and given.split("=")[0] in capsys.readouterr().err
