"""The faults of tests/mutants.py can still be planted."""

import pytest

from tests.helpers import repository
from tests.mutants import TABLE


@pytest.mark.parametrize("mutant", TABLE, ids=lambda mutant: mutant.name)
def test_a_mutant_has_its_place_and_its_tests(mutant):
    assert (repository() / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert all((repository() / path).exists() for path in mutant.tests.split())


def test_names_are_unique():
    assert len({mutant.name for mutant in TABLE}) == len(TABLE)
