"""The vision tower learns words from captions, and a fresh backbone starts from it."""

from __future__ import annotations

import pytest
import torch
import yaml

from data_prep import convert_llava, make_scenes
from experiments.pretrain_vision import caption_words, main
from gemoe_ds.models.tiny.backbone import TinyBackbone
from tests.tiny import write_tokenizer


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("vision")
    scenes = root / "scenes"
    make_scenes.main(["--out", str(scenes), "--train", "200", "--validation", "1", "--test", "1"])
    files = ["--json", scenes / "train.json", "--kinds", scenes / "train_kinds.json"]
    arguments = [*files, "--images", scenes / "images", "--out", root / "data"]
    convert_llava.main([str(a) for a in arguments])
    recipe = {
        "output_dir": str(root / "run"),
        "model": {
            "backbone": {"name": "tiny", "image_size": 32, "vision_width": 32},
            "router": {"name": "top_k"},
            "trainable": "all",
        },
        "data": {"train_path": str(root / "data"), "tokenizer": str(write_tokenizer(root / "tok"))},
        "optim": {"lr": 1e-3},
        "train": {"steps": 1, "micro_batch_size": 1},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def test_tower_is_saved_and_used(setting):
    out = setting / "tower"
    main([str(setting / "recipe.yaml"), "--out", str(out), "--steps", "30", "--batch", "16"])
    config = {"image_size": 32, "vision_width": 32, "vision_checkpoint": str(out)}
    model = TinyBackbone(TinyBackbone.Config(**config)).load(None, setting / "tok")
    fresh = TinyBackbone(TinyBackbone.Config(**config | {"vision_checkpoint": None}))
    name = next(n for n, _ in model.named_parameters() if n.endswith("patch_embedding.weight"))
    random = fresh.load(None, setting / "tok").get_parameter(name)
    from transformers import CLIPVisionModel

    trained = CLIPVisionModel.from_pretrained(out)
    stored = next(p for n, p in trained.named_parameters() if n.endswith("patch_embedding.weight"))
    assert torch.equal(model.get_parameter(name), stored)
    assert not torch.equal(random, stored)


def test_words_are_those_of_the_captions(setting):
    from gemoe_ds.data.sample import open_samples

    samples = open_samples(setting / "data")
    pixels, words = caption_words(samples, "caption", 32)
    assert pixels.shape == (200, 3, 32, 32) and pixels.dtype == torch.uint8
    assert words.shape[0] == 200 and 0 < words.float().mean() < 1


def test_data_without_captions_is_refused(setting, capsys):
    with pytest.raises(SystemExit):
        main([str(setting / "recipe.yaml"), "--out", str(setting / "x"), "--kind", "poem"])
    assert "no sample has an image and a turn of kind 'poem'" in capsys.readouterr().err
    assert not (setting / "x").exists()
