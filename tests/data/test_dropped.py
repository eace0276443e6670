"""How many rows of a source may be left out."""

import pytest

from gemoe_ds.data.dropped import DropList, Dropped
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
