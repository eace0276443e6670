"""The paper's "N" column follows from its "Avg" column, row by row."""

from __future__ import annotations

import pytest

from experiments.published import activated_parameters
from gemoe_ds.errors import ConfigError

ROWS = [  # backbone, mean k, N in billions as printed (Tables 1 and 2)
    ("molmoe", 8.00, 1.58),  # Top-8
    ("molmoe", 6.19, 1.40),  # DynMoE
    ("molmoe", 12.65, 2.05),  # Top-P
    ("molmoe", 6.13, 1.39),  # AdaMoE
    ("molmoe", 7.03, 1.48),  # MoE++
    ("molmoe", 5.43, 1.32),  # GeMoE
    ("molmoe", 7.00, 1.48),  # Top-7
    ("molmoe", 6.00, 1.38),  # Top-6
    ("molmoe", 5.00, 1.28),  # Top-5
    ("deepseek_vl2_tiny", 6.00, 1.17),
    ("deepseek_vl2_tiny", 5.00, 1.13),
    ("deepseek_vl2_tiny", 4.00, 1.09),
    ("deepseek_vl2_tiny", 3.00, 1.06),
    ("deepseek_vl2_tiny", 3.55, 1.08),  # GeMoE
]


@pytest.mark.parametrize("backbone, mean_k, billions", ROWS)
def test_printed_row(backbone, mean_k, billions):
    assert round(activated_parameters(backbone, mean_k) / 1e9, 2) == billions


def test_unknown_backbone():
    with pytest.raises(ConfigError, match="molmoe, deepseek_vl2_tiny"):
        activated_parameters("olmoe", 8)
