"""The tests that tests/cluster/faults.py names are there."""

import pytest

from tests.cluster.faults import FAULTS
from tests.helpers import repository


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: str(fault.number))
def test_a_fault_has_its_tests(fault):
    for words in fault.tests:
        path, _, name = words.partition("::")
        assert f"def {name}" in (repository() / path).read_text(encoding="utf-8")


def test_numbers_are_unique():
    assert len({fault.number for fault in FAULTS}) == len(FAULTS)
