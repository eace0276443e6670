"""The command as a user gives it, on a small source."""

from __future__ import annotations

import pytest

from gemoe_ds.cli.data.convert import main
from gemoe_ds.data.sample import open_samples


@pytest.fixture
def convert(tmp_path, capsys):
    """The samples, or the one line of a refusal that leaves nothing."""

    def run(source, *options):
        try:
            main([str(word) for word in (source, "--out", tmp_path / "out", *options)])
        except SystemExit as stop:
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert stop.code == 2 and not (tmp_path / "out").exists()
            return line
        return open_samples(tmp_path / "out", verify=True)

    return run
