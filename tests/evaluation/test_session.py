"""The recipe of an evaluation, as it is read on a rank."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest

from gemoe_ds.config.old_names import _say_once
from gemoe_ds.evaluation.arguments import session_parser
from gemoe_ds.evaluation.session import session_config
from tests.config.minimal import MINIMAL

MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_speaks_of_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    """Under mpirun, whose ranks have no RANK of their own."""
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    for name in ("tokenizer", "base"):
        (tmp_path / name).mkdir()
    words = [str(tmp_path / "recipe.yaml"), "data.threads=2", "--data", "d", "--out", "o"]
    arguments = session_parser(None).parse_intermixed_args([*words, "--k", "2"])
    own = {f"OMPI_COMM_WORLD_{name}": str(rank) for name in ("RANK", "LOCAL_RANK")}
    _say_once.cache_clear()
    with mock.patch.dict(os.environ, MPI | own):
        assert session_config(arguments).data.num_workers == 2
    said = capsys.readouterr().err
    assert ("warning: data.threads is called data.num_workers" in said) == (rank == 0)
