"""A folder comes over the network once: equal weights, each byte read by one rank of all hosts."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gemoe_ds.engine import host_memory
from gemoe_ds.engine import read_once as module
from gemoe_ds.engine.groups import expert_shard
from gemoe_ds.engine.read_once import ReadOnce, is_on_network, sha256_over_ranks
from gemoe_ds.engine.world import distributed
from gemoe_ds.errors import CheckpointError
from gemoe_ds.files import sha256_of
from gemoe_ds.hf_io import loader
from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.hf_io.key_rules import KeyMap
from gemoe_ds.hf_io.loader import Weights, materialise
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.moe.router import Router
from tests.helpers import run_ranks
from tests.models.cases import write_case
from tests.scale.reading import stored_bytes


def memory_of(world, hosts: str, *, once: bool = True):
    host_memory._this_host = lambda: hosts[world.rank]
    memory = host_memory.HostMemory.of(world)
    return ReadOnce(memory.ranks, world) if once else memory


def count_bytes() -> list[int]:
    """The bytes of every read of a tensor from now on."""
    read, preadv = [], os.preadv

    def counted(*arguments):
        read.append(preadv(*arguments))
        return read[-1]

    os.preadv = counted
    return read


def digest(model: nn.Module) -> str:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    of_all = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        bits = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        of_all.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        of_all.update(bits.tobytes())
    return of_all.hexdigest()


@dataclass(frozen=True)
class Case:
    name: str
    hosts: str  # a letter a rank
    train: str
    dtype: str
    ep_size: int


def loaded(rank: int, root: Path, cases: list[Case]) -> list[tuple[list[str], list[int]]]:
    """Digests of the model as each host reads it and as one of them does; the bytes of both."""
    loader._WORTH_SHARING = 256  # bytes: the models are small
    read = count_bytes()
    with distributed() as world:
        return [loaded_twice(case, root / case.name, world, read) for case in cases]


def loaded_twice(case: Case, folder: Path, world, read: list[int]) -> tuple[list[str], list[int]]:
    shard = expert_shard(case.ep_size, world)
    found, sizes = [], []
    for once in (False, True):
        torch.manual_seed(0)
        read.clear()
        model = MoEModel.from_checkpoint(
            Backbone.named(case.name)(Backbone.named(case.name).Config()),
            folder / "base",
            folder / "tokenizer",
            (Router.named("gemoe"), Router.named("gemoe").Config()),
            train=case.train,
            dtype=getattr(torch, case.dtype),
            shard=shard,
            memory=memory_of(world, case.hosts, once=once),
        )
        found.append(digest(model))
        sizes.append(sum(read))
    return found, sizes


QUICK = [
    Case("olmoe", "aabb", "routers", "bfloat16", 2),
    Case("deepseek_vl2", "abab", "experts", "bfloat16", 1),
    Case("molmoe", "abcd", "routers", "float32", 2),
]
SLOW = [Case("qwen3_vl_moe", "aaab", "all", "float32", 4)]


@pytest.mark.parametrize("cases", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_every_byte_is_read_once(tmp_path, cases):
    for case in cases:
        write_case(case.name, tmp_path / case.name)
    found = run_ranks(loaded, 4, tmp_path, cases)
    for case, by_rank in zip(cases, zip(*found, strict=True), strict=True):
        for (each, once), _ in by_rank:
            assert each == once, case
        stored = stored_bytes(tmp_path / case.name / "base")
        by_each, once = (sum(sizes[n] for _, sizes in by_rank) for n in (0, 1))
        assert once <= stored < by_each, case


class Matrices(nn.Module):
    def __init__(self, _: object = None) -> None:
        super().__init__()
        for n in range(6):
            setattr(self, f"large{n}", nn.Parameter(torch.randn(40 + n, 1024)))


def refused(rank: int, folder: str) -> str:
    with distributed() as world:
        model = meta_model(Matrices, None).requires_grad_(False)
        memory = memory_of(world, "abc")
        try:
            weights = Weights(Path(folder), KeyMap(()), model)
            weights.fill(materialise(model, torch.bfloat16, memory), memory)
        except CheckpointError as error:
            return str(error)
        return ""


def test_what_is_wrong_with_a_weight_all_ranks_say(tmp_path):
    tensors = Matrices().state_dict()
    files = {}
    for n, (key, tensor) in enumerate(tensors.items()):
        files[key] = f"{n}.safetensors"
        save_file({key: tensor * (torch.nan if n == 3 else 1)}, tmp_path / files[key])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for said in run_ranks(refused, 3, str(tmp_path)):
        assert "3.safetensors: large3 holds NaN" in said


def hashed(rank: int, files: list[Path]) -> tuple[dict[Path, str], int]:
    read = []
    module.sha256_of = lambda path: read.append(path) or sha256_of(path)
    with distributed() as world:
        return sha256_over_ranks(files, world), len(read)


def test_files_are_hashed_by_one_rank_each(tmp_path):
    files = [tmp_path / str(n) for n in range(5)]
    for path in files:
        path.write_text(path.name)
    found = run_ranks(hashed, 3, files)
    assert sum(number for _, number in found) == 5 and max(n for _, n in found) == 2
    assert all(checksums == {path: sha256_of(path) for path in files} for checksums, _ in found)


def failed(rank: int, files: list[Path]) -> str:
    with pytest.raises(CheckpointError) as said:
        hashed(rank, files)
    return str(said.value)


def test_a_file_that_one_rank_cannot_read(tmp_path):
    (tmp_path / "a").write_text("")
    for said in run_ranks(failed, 2, [tmp_path / "a", tmp_path / "b"]):
        assert said == f"rank 1 cannot read {tmp_path / 'b'}: No such file or directory"


def test_where_a_folder_lies(tmp_path):
    mounts = tmp_path / "mounts"
    (tmp_path / "a b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a b")
    for kind, expected in {
        "ext4": False,
        "overlay": False,
        "nfs4": True,
        "lustre": True,
        "fuse.juicefs": True,
    }.items():
        place = str(tmp_path / "a b").replace(" ", r"\040")
        mounts.write_text(f"/dev/sda / ext4 rw 0 0\nwhere {place} {kind} rw 0 0\n")
        assert is_on_network(tmp_path / "link", mounts) is expected, kind
    assert not is_on_network(tmp_path, mounts)
    assert not is_on_network(tmp_path, tmp_path / "nothing")
