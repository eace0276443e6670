import pytest

from gemoe_ds.config.deepspeed_values import flag


@pytest.mark.parametrize(
    "given, meant",
    [("false", False), ("False", False), ("TRUE", True), (0, False), (1, True), (True, True)],
)
def test_flags(given: object, meant: bool) -> None:
    assert flag(given) is meant
