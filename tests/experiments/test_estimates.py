"""What `python -m experiments.estimates` writes is what `gemoe train RECIPE --estimate` prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from experiments.estimates import RUNS, Estimates, Run, rows
from gemoe_ds.cli.train import main
from gemoe_ds.config.load import load_config
from gemoe_ds.hf_io.quantised_tensor import with_scales
from gemoe_ds.hf_io.safetensors_reader import open_stored
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.random_checkpoint import write_headers

OLMOE = Run("olmoe_gemoe_8_gpus", 8, 8)


@pytest.mark.parametrize("name, float8", [("olmoe", False), ("qwen3_vl_moe", True)])
def test_a_folder_of_headers_has_a_model_s_true_size_and_holds_nothing(
    name: str, float8: bool, tmp_path: Path
) -> None:
    backbone = Backbone.named(name)
    write_headers(backbone, tmp_path, shards=8, float8=float8)
    stored = with_scales(open_stored(tmp_path))  # the loader's reader: sizes, index, scales
    numbers = sum(torch.Size(tensor.shape).numel() for tensor in stored.values())
    assert numbers == backbone.published_parameters
    sizes = [path.stat() for path in tmp_path.glob("*.safetensors")]
    assert sum(size.st_size for size in sizes) > (1 if float8 else 2) * numbers
    assert sum(512 * size.st_blocks for size in sizes) < numbers / 100
    loaded = backbone(backbone.Config()).load(tmp_path, tmp_path)
    assert {name: p.shape for name, p in loaded.named_parameters()} == {
        name: p.shape for name, p in backbone.published().named_parameters()
    }


def test_a_row_is_what_the_command_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    estimates = Estimates(tmp_path)
    row = estimates.row(OLMOE)
    paths, _ = estimates.paths(load_config(OLMOE.recipe))
    main([OLMOE.recipe, "--estimate", str(OLMOE.ranks), *paths, *OLMOE.options])
    said = capsys.readouterr().out
    (total,) = re.findall(r"estimate for one rank: ([\d.]+) GiB of GPU memory", said)
    (beside,) = re.findall(r"CUDA's context ([\d.]+), NCCL's buffers ([\d.]+)", said)
    assert f"{row['gib']:.2f}" == total
    assert row["beside_gib"] == pytest.approx(sum(map(float, beside)), abs=0.01)
    assert row["gib"] == pytest.approx(sum(row["parts_gib"].values()), abs=0.01)
    assert "2,004 tokens on average" in said  # the text, and the chat's four


def test_a_sample_with_a_picture_is_of_the_size_that_the_page_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Estimates(tmp_path).row(Run("qwen3_vl_gemoe_1_gpu_24gb", 1, 1))
    assert row["sample"] == {"pixels": (640, 480), "text_tokens": 70}
    shown = 640 // 32 * 480 // 32 + 2  # tokens of the picture, and the two around it
    assert f"{shown + 70 + 6} tokens on average" in capsys.readouterr().out
    assert row["parts_gib"]["frozen weights"] == pytest.approx(17, abs=0.7)  # 0.56 bytes of most


def test_rows_are_of_the_recipes_that_are_asked_for_and_name_no_folder() -> None:
    (row,) = rows([OLMOE])
    assert (row["recipe"], row["ranks"], row["ep_size"]) == ("olmoe_gemoe_8_gpus", 8, 8)
    assert "/" not in str(row)
    assert len({run.recipe for run in RUNS}) == len(RUNS) == 10
