"""Each tensor of a checkpoint is read by one rank; what is not asked for, by none."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

from gemoe_ds.checkpoint import manifest
from gemoe_ds.checkpoint.manifest import MANIFEST, SCHEMA, WEIGHTS, describe, num_bytes
from gemoe_ds.checkpoint.reading import TrainedTensors, read_together
from gemoe_ds.checkpoint.shards import expert_key
from gemoe_ds.engine.read_once import peers_by
from gemoe_ds.engine.world import distributed
from gemoe_ds.hf_io.renamed import Renamed
from tests.helpers import repository, run_ranks
from tests.train.resuming import make_config, train_all, write_setting

EXPERTS = "layers.1.experts.down_EDG"


class Counted:
    """A file of safetensors that counts the bytes of the tensors that are read from it."""

    def __init__(self, file, read: list[int]) -> None:
        self.file, self.read = file, read

    def __enter__(self):
        return Counted(self.file.__enter__(), self.read)

    def __exit__(self, *problem):
        return self.file.__exit__(*problem)

    def keys(self):
        return self.file.keys()

    def get_tensor(self, key):
        tensor = self.file.get_tensor(key)
        self.read.append(tensor.nbytes)
        return tensor


def count_bytes() -> list[int]:
    """The bytes of every tensor that this process reads of a checkpoint from now on."""
    read, opened = [], manifest._opened
    manifest._opened = lambda path: Counted(opened(path), read)
    return read


def write_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Of two writers; a scalar, an empty tensor, and 12 experts, more than one digit."""
    torch.manual_seed(0)
    weights = {"gate.weight": torch.randn(5, 7), "step": torch.tensor(3.0), "none": torch.empty(0)}
    weights |= {expert_key(EXPERTS, n): torch.randn(4, 3) for n in range(12)}
    entries = {}
    for rank in range(2):
        file = f"{WEIGHTS}-{rank:05d}.safetensors"
        part = dict(list(weights.items())[rank::2])
        save_file(part, folder / file)
        entries |= describe(part, file)
    header = {"schema": SCHEMA, "step": 1, "updates": 1, "identity": {}, "tensors": entries}
    (folder / MANIFEST).write_text(json.dumps(header))
    return weights


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    weights = write_checkpoint(tmp_path)
    monkeypatch.setattr(manifest, "_opened", manifest._opened)
    read = count_bytes()
    found = TrainedTensors(manifest.read(tmp_path))
    assert set(found) == {"gate.weight", "step", "none", EXPERTS} and EXPERTS in found
    renamed = Renamed(found, {"theirs": EXPERTS})
    assert "theirs" in renamed and EXPERTS not in renamed and len(renamed) == 1 and not read
    experts = torch.stack([weights[expert_key(EXPERTS, n)] for n in range(12)])
    for _ in range(3):  # as many files of another layout ask for one expert after the other
        assert torch.equal(renamed["theirs"], experts)
    assert sum(read) == experts.nbytes
    for name in ("gate.weight", "step", "none"):
        assert torch.equal(found[name], weights[name])


def together(rank: int, folder: str, orders: list[list[str]]) -> tuple[list, int]:
    """What a rank gets; ranks 0 and 2, and 1 and 3, keep the same."""
    read = count_bytes()
    checkpoint = manifest.read(Path(folder))
    with distributed() as world, peers_by(rank % 2, world) as pairs, peers_by(None, world) as all_:
        mine = read_together(checkpoint, orders[rank % 2], pairs)
        everyone = read_together(checkpoint, orders[2], all_)
        found = [t for some in zip(mine, everyone, strict=True) for t in some]  # in turn
    return found, sum(read)


def test_each_tensor_is_read_by_one_of_those_that_keep_it(tmp_path):
    weights = write_checkpoint(tmp_path)
    rng = random.Random(0)
    orders = [rng.sample(sorted(weights), 9) for _ in range(3)]
    found = run_ranks(together, 4, str(tmp_path), orders)
    sizes = [sum(weights[key].nbytes for key in order) for order in orders]
    for rank, (tensors, read) in enumerate(found):
        expected = [key for pair in zip(orders[rank % 2], orders[2], strict=True) for key in pair]
        for key, tensor in zip(expected, tensors, strict=True):
            assert torch.equal(tensor, weights[key]) and tensor.dtype == weights[key].dtype, key
        largest = max(tensor.nbytes for tensor in weights.values())
        assert read <= sizes[rank % 2] / 2 + sizes[2] / 4 + 2 * largest
    assert sum(read for _, read in found) == sum(sizes)


def go_on(rank: int, configs: list) -> tuple[str | None, int]:
    read = count_bytes()
    return train_all(rank, configs), sum(read)


def test_nobody_reads_more_than_its_part_of_a_run(tmp_path):
    """Trained experts, of which two ranks have the same: a resume, a save, and the whole model."""
    setting = write_setting(tmp_path)
    runs = [
        make_config(
            setting,
            tmp_path / "run",
            model__trainable="all",
            train={"steps": steps, "micro_batch_size": 1},
            parallel__ep_size=2,
            resume=resume,
            deepspeed=str(repository() / "ds_configs/zero2.json"),
        )
        for steps, resume in ((3, "none"), (4, "auto"))
    ]
    assert [said for said, _ in run_ranks(go_on, 4, runs[:1])] == [None] * 4
    stored = manifest.read(tmp_path / "run/checkpoints/step-000003").manifest["tensors"]
    sizes = {key: num_bytes(entry) for key, entry in stored.items()}
    total, largest = sum(sizes.values()), max(sizes.values())
    of_weights = sum(size for key, size in sizes.items() if stored[key]["file"].startswith(WEIGHTS))
    found = run_ranks(go_on, 4, runs[1:])
    assert [said for said, _ in found] == [None] * 4
    read = [number for _, number in found]
    # To verify, to go on, to read back what was saved, and once more what the model has.
    assert sum(read) <= 3 * total + of_weights
    # The base is one file, which one rank writes.
    assert sorted(read)[-2] <= 3 * total / 4 + largest
    assert max(read) <= 3 * total / 4 + largest + of_weights
