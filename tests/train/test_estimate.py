"""Memory that is said to be needed against memory that is."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import weakref

import pytest
import torch

import gemoe_ds.train.estimate as module
from gemoe_ds.data.collate import Collator
from gemoe_ds.data.mixture import Subset, open_training
from gemoe_ds.data.sample import open_samples
from gemoe_ds.data.stream import batch_bytes
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.moe.experts import onednn
from gemoe_ds.train import assemble
from gemoe_ds.train.assemble import build_collator, build_model, meta_collator
from gemoe_ds.train.checks.samples import check_samples
from gemoe_ds.train.estimate import estimate
from tests.helpers import repository, run_python
from tests.train.resuming import make_config, write_setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("estimate"))


@pytest.mark.parametrize("train", ["routers", "experts", "all"])
@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_model(setting, tmp_path, train, ep_size, dtype):
    config = make_config(
        setting, tmp_path, model__trainable=train, model__dtype=dtype, parallel__ep_size=ep_size
    )
    parts = estimate(config, open_samples(config.data.train_path), 4, torch.device("cpu")).parts
    model = build_model(config, ExpertShard(0, ep_size))
    trained = sum(p.numel() * 4 for p in model.trainable().values())
    experts = [b for layer in model.moe_layers for b in layer.experts.buffers()]
    bases = [layer.base for layer in model.moe_layers if layer.base is not None]
    experts += [gate for base in bases for gate in base.buffers()]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert parts["weights that train"] == trained
    assert parts["frozen weights"] == sum(t.numel() * t.itemsize for t in frozen + experts)


@pytest.mark.parametrize(
    "train, ep_size, ranks, groups",
    [("routers", 1, 1, 0), ("routers", 1, 4, 1), ("routers", 2, 4, 2), ("all", 2, 4, 3)],
)
def test_what_a_gpu_holds_beside_torch_s_memory(setting, tmp_path, train, ep_size, ranks, groups):
    config = make_config(setting, tmp_path, model__trainable=train, parallel__ep_size=ep_size)
    samples = open_samples(config.data.train_path)
    found = estimate(config, samples, ranks, torch.device("cuda"))
    assert found.beside[module.CONNECTIONS] == groups * module._COMMUNICATOR
    assert "and beside it on the GPU, roughly: CUDA's context 0.49" in str(found)
    assert estimate(config, samples, ranks, torch.device("cpu")).beside == {}


@pytest.mark.parametrize("train", ["routers", "experts", "all"])
@pytest.mark.parametrize("stage", [2, 3])
def test_what_a_host_has_once(setting, tmp_path, train, stage):
    """All that neither trains nor is an expert nor a router's; ZeRO 3 divides it instead."""
    path = str(repository() / f"ds_configs/zero{stage}.json")
    config = make_config(setting, tmp_path, model__trainable=train, deepspeed=path)
    samples = open_samples(config.data.train_path)
    model = build_model(config, ExpertShard(0, config.ep_size))
    routers = {id(p) for layer in model.moe_layers for p in layer.router.parameters()}
    frozen = (p for p in model.parameters() if not p.requires_grad and id(p) not in routers)
    expected = 0 if stage == 3 else sum(p.numel() * p.itemsize for p in frozen)
    assert estimate(config, samples, 2, torch.device("cpu")).common == expected
    assert estimate(config, samples, 2, torch.device("cuda")).common == 0


@pytest.mark.parametrize("ep_size", [1, 2])
def test_zero_divides_what_it_divides(setting, tmp_path, ep_size):
    """Gradients from stage 2 on, optimizer states from stage 1 on, weights in stage 3: a shard of
    the experts among the ranks that have it, so that each has a quarter of all."""
    samples = open_samples(setting["data"])
    found = {}
    for stage in range(4):
        config = make_config(
            setting,
            tmp_path,
            model__trainable="all",
            parallel__ep_size=ep_size,
            deepspeed=str(repository() / f"ds_configs/zero{stage}.json"),
        )
        found[stage] = estimate(config, samples, 4, torch.device("cuda")).parts
    one = found[0]["weights that train"]
    model = build_model(config, ExpertShard())
    part = sum(p.numel() for p in model.trainable().values())  # 4 bytes each, of 4 ranks
    assert one == 4 * part if ep_size == 1 else 2 * part < one < 4 * part
    assert [found[s]["weights that train"] for s in range(4)] == [one, one, one, part]
    assert [found[s]["their gradients"] for s in range(4)] == [one, one, part, part]
    states = [found[s]["their optimizer states"] for s in range(4)]
    assert states == [2 * one, *[3 * part] * 3]
    assert [found[s]["buckets of gradients"] for s in range(3)] == [0, 200_000_000, 200_000_000]


@pytest.mark.parametrize("train, experts", [("routers", "frozen"), ("experts", "none")])
def test_zero_3_divides_what_is_frozen_but_experts(setting, tmp_path, train, experts):
    samples, found = open_samples(setting["data"]), []
    for stage in (2, 3):
        path = str(repository() / f"ds_configs/zero{stage}.json")
        config = make_config(setting, tmp_path, model__trainable=train, deepspeed=path)
        found.append(estimate(config, samples, 4, torch.device("cuda")).parts["frozen weights"])
    model = build_model(config, ExpertShard(0, config.ep_size))
    routers = {id(p) for layer in model.moe_layers for p in layer.router.parameters()}
    frozen = (p for p in model.parameters() if not p.requires_grad and id(p) not in routers)
    rest = sum(p.numel() * p.itemsize for p in frozen)
    assert found[0] - found[1] == rest - rest // 4
    assert (found[0] == rest) == (experts == "none")


@pytest.mark.parametrize(
    "router, k",
    [
        ({"name": "gemoe"}, 4),
        ({"name": "ltdr"}, 6),  # of the tail
        ({"name": "dynmoe"}, 4),  # half of the 8 experts in the first step
        ({"name": "top_p", "threshold": 0.7}, 6),
        ({"name": "ada_k"}, 4.5),
        ({"name": "remoe", "target_k": 5.0}, 5),
        ({"name": "beam"}, 4),  # closed masks run too
        ({"name": "dtop_p", "target_k": 5.0}, 6),
    ],
)
def test_activations_are_those_of_the_most_experts_that_a_method_takes(
    setting, tmp_path, router, k
):
    """As for a static k that is as large, where that is a whole number."""

    def activations(router):
        config = make_config(setting, tmp_path, model__router=router, parallel__ep_size=1)
        samples = open_samples(config.data.train_path)
        return estimate(config, samples, 1, torch.device("cpu")).parts["activations"]

    below, above = (activations({"name": "top_k", "k": n}) for n in (int(k), math.ceil(k)))
    assert below <= activations(router) <= above


@pytest.mark.parametrize("tokens", ["answers", "text", "all"])
def test_a_teacher_is_listened_to_at_so_many_positions(setting, tmp_path, tokens):
    config = make_config(setting, tmp_path, train__distill={"tokens": tokens})
    samples = open_samples(config.data.train_path)
    parts = estimate(config, samples, 2, torch.device("cuda")).parts
    model = build_model(config, ExpertShard())
    collator, most = build_collator(config, model), []
    for row in range(len(samples)):
        batch = collator.batch([collator.encode(row, samples[row])])
        number = int(model.distill.positions(batch.labels_BS, batch.model_inputs).sum())
        most.append((number, batch.num_targets))
    size = config.train.micro_batch_size
    positions, targets = (sum(sorted(n)[-size:]) for n in zip(*most, strict=True))
    positions += size * (tokens == "text")  # the first token is text, but follows none
    numbers = (2 * positions + positions - targets) * 26 + positions * 16
    assert parts["distillation"] == numbers * 4


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_dry_run_says_what_was_estimated_and_needed_and_writes_nothing(setting, tmp_path, dtype):
    """On a machine like those that the process's share was measured on."""
    file = json.loads((repository() / "ds_configs/zero2.json").read_text())
    file["csv_monitor"] = {"enabled": True, "output_path": str(tmp_path / "out")}
    (tmp_path / "ds.json").write_text(json.dumps(file))
    own = {"model__dtype": dtype, "deepspeed": str(tmp_path / "ds.json")}
    config = make_config(setting, tmp_path / "out", parallel__ep_size=1, **own)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.dump_yaml())
    command = [sys.executable, repository() / "launch/train.py", recipe, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    line = re.search(r"memory of the fullest rank: ([\d.]+) GiB; ([\d.]+) were", done.stdout)
    measured, estimated = map(float, line.groups())
    assert estimated == pytest.approx(measured, rel=0.1)
    assert "Python and its packages" in done.stdout
    assert "dry run: one step of" in done.stdout and "router" in done.stdout
    assert "tokenizer: ids up to 25, the model has 26 rows: each has its row" in done.stdout
    assert not (tmp_path / "out").exists()


def test_images_are_decoded_of_the_longest_and_the_largest_only(setting, tmp_path, monkeypatch):
    """Nor do they count as the process's own, whose share is taken before any is decoded."""
    held, most = [], 0

    class Watched(Collator):
        def encode(self, row, sample):
            nonlocal most
            encoded = super().encode(row, sample)
            held.append(weakref.ref(encoded))
            most = max(most, sum(ref() is not None for ref in held))
            return encoded

    monkeypatch.setattr(assemble, "Collator", Watched)
    taken = []
    monkeypatch.setattr(module, "resident_memory", lambda: taken.append(len(held)) or 7)
    config = make_config(setting, tmp_path, parallel__ep_size=1)
    samples = open_samples(setting["data"])
    parts = estimate(config, samples, 1, torch.device("cpu")).parts
    size = config.train.micro_batch_size
    again = 1  # to see what making it takes
    assert len(held) == 2 * size + again < len(samples) and most <= size + again
    assert taken == [0] and parts["Python and its packages"] == 7 + module._ENGINE


def test_reading_ahead_is_bounded_by_bytes(setting, tmp_path):
    """Host memory: a part of the estimate on CPUs, a line of its own for a GPU."""

    def found(device: str, **changes):
        config = make_config(
            setting,
            tmp_path,
            parallel__ep_size=1,
            train__gradient_accumulation_steps=2,
            data__num_workers=8,
            **changes,
        )
        samples = open_samples(config.data.train_path)
        return estimate(config, samples, 1, torch.device(device))

    wide, narrow = found("cpu"), found("cpu", data__prefetch_bytes=1)
    size = wide.largest_batch
    assert 0 < narrow.read_ahead < wide.read_ahead
    assert wide.parts["images read ahead"] == wide.read_ahead
    collator = meta_collator(make_config(setting, tmp_path))
    folder = open_samples(setting["data"])
    samples = [collator.encode(row, folder[row]) for row in range(len(folder))]
    pairs = [collator.batch([one, one]) for one in samples]
    assert size == max(batch_bytes(pair) for pair in pairs)
    gpu = found("cuda", data__prefetch_bytes=3 * 2**30)
    assert "in host memory, for micro-batches read ahead: 0.00 GiB (data.prefetch_bytes)" in str(
        gpu
    )


def test_of_a_mixture_it_is_that_of_the_samples_that_are_trained_on(setting, tmp_path):
    """The longest ones may be over a limit, or held out."""
    parts = [{"path": str(setting["data"]), "limit": 4}]
    config = make_config(
        setting, tmp_path, parallel__ep_size=1, data__train_path=parts, data__holdout=3
    )
    samples = open_training(config.data.train_path)
    checked = check_samples(config, samples, meta_collator(config))
    assert len(checked.selection.row_M) == 4 and len(checked.selection.held_out_H) == 3
    some = Subset(samples, checked.selection.row_M, "some")
    collator = meta_collator(config)
    longest = sorted(len(collator.encode(0, some[row]).input_ids) for row in range(4))[-2:]
    found = []
    original = module.activation_bytes

    def seen(backbone, hf, blocks, shape):
        found.append(shape.tokens)
        return original(backbone, hf, blocks, shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "activation_bytes", seen)
        estimate(config, samples, 1, torch.device("cuda"), checked)
    assert found[0] == 2 * longest[1]


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_packed_experts_are_further_copies(has_bfloat16, setting, tmp_path, monkeypatch):
    """Where the CPU multiplies bfloat16: elsewhere nothing is packed."""
    monkeypatch.setattr(onednn, "_has_bfloat16", lambda: has_bfloat16)
    samples = open_samples(setting["data"])
    packed, plain = (
        estimate(
            make_config(setting, tmp_path, model__pack_experts=pack, model__dtype="bfloat16"),
            samples,
            2,
            torch.device("cpu"),
        ).parts
        for pack in (True, False)
    )
    per_layer = 4 * 3 * 16 * 8 * 2  # of 8 experts half, bfloat16
    assert packed.get("packed experts", 0) == (3 * per_layer if has_bfloat16 else 0)
    assert "packed experts" not in plain


def test_estimate_for_ranks_that_are_not_here(setting, tmp_path):
    config = make_config(setting, tmp_path / "out", parallel__ep_size=4)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.dump_yaml())
    command = ["launch/train.py", recipe, "--estimate"]
    done = run_python(*command, 8)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"estimate for one rank: 0.\d+ GiB of GPU memory", done.stdout)
    for ranks, message in (
        ("0", "argument --estimate: 0 is not a number from 1 to"),
        ("6", "does not divide the 6"),
    ):
        done = run_python(*command, ranks)
        assert done.returncode == 2 and message in done.stderr
