"""The faults of tests/mutants.yaml can still be planted."""

from collections import Counter

import pytest

from tests.mutants import REPOSITORY, table


@pytest.mark.parametrize("mutant", table(), ids=lambda mutant: mutant.name)
def test_a_mutant_has_its_place_and_its_tests(mutant):
    text = (REPOSITORY / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert mutant.tests
    for words in mutant.tests.split():
        path, _, name = words.partition("::")
        assert f"def {name}" in (REPOSITORY / path).read_text(encoding="utf-8")


def test_names_are_unique():
    assert set(Counter(mutant.name for mutant in table()).values()) == {1}
