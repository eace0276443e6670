"""How many rows of a source may be left out."""

import pytest

from gemoe_ds.data.dropped import LISTED_DROPS, DropList, Dropped
from gemoe_ds.errors import DataError


def test_as_many_as_allowed_and_no_more():
    drops = DropList()
    drops.append(Dropped("a", "no image"))
    drops.check("rows.json", 4, 0.25)
    drops.append(Dropped("b", "no text"))
    with pytest.raises(DataError, match="2 of 4 rows cannot be used, more than 25%.*first: a: no"):
        drops.check("rows.json", 4, 0.25)
    with pytest.raises(DataError, match="none of 2 rows can be used"):
        drops.check("rows.json", 2, 1.0)


def test_the_first_of_all_parts_are_listed():
    total = DropList()
    for part, number in enumerate((2, LISTED_DROPS - 3, 9)):
        drops = DropList()
        for row in range(number):
            drops.append(Dropped(f"{part}/{row}", "no image"))
        total.add(DropList.of_state(drops.state()))
    assert len(total) == LISTED_DROPS + 8 and len(total.first) == LISTED_DROPS
    assert [one.id for one in total.first[:3]] == ["0/0", "0/1", "1/0"]
    assert total.first[-1].id == "2/0"
