"""Where a result comes from."""

from __future__ import annotations

from gemoe_ds.analysis.provenance import provenance
from tests.analysis.evaluations import record


def test_provenance_fills_the_fields_of_a_record() -> None:
    where = provenance()
    assert set(where) == {"command", "commit", "machine", "date"}
    assert " x " in where["machine"]
    assert where["date"].endswith("+00:00")
    assert record("top_k", 8, {"fact": 0.9}, **where).command == where["command"]
