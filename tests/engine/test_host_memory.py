"""Ranks of a host have the weights that do not train once; without that, each has its own."""

from __future__ import annotations

import gc
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gemoe_ds.engine import host_memory as module
from gemoe_ds.engine.world import distributed, gather_objects
from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.allocator import LOCAL
from gemoe_ds.hf_io.hf_config import meta_model
from gemoe_ds.hf_io.key_rules import KeyMap
from gemoe_ds.hf_io.loader import Weights, materialise
from gemoe_ds.hf_io.safetensors_reader import StoredTensor
from tests.helpers import run_ranks

MB = 2**20


@contextmanager
def memory_of(world, how: str):
    """As it is on one host; on two; where a rank cannot have files without a name, or see those of
    another."""
    with pytest.MonkeyPatch.context() as patch:
        if how == "two hosts":
            patch.setattr(module, "_this_host", lambda: f"host {world.rank // 2}")
        if how == "no memfd" and world.rank == 0:
            patch.setattr(os, "memfd_create", lambda *_: os.open("/nowhere", os.O_RDWR))
        if how == "cannot open" and world.rank == 1:
            patch.setattr(module, "_mapped", lambda *_: open("/proc/nobody"))  # noqa: SIM115
        yield module.HostMemory.of(world)


def written(rank: int, hows: list[str]) -> dict[str, tuple[int, int, list[list[float]]]]:
    """What every rank reads after each has written its number into a row of its own."""
    found = {}
    with distributed() as world:
        for how in hows:
            with memory_of(world, how) as memory:
                found[how] = written_to(memory, rank)
    return found


def written_to(memory, rank: int) -> tuple[int, int, list[list[float]]]:
    tensors = memory.allocate([(4, 3), (4, 1)], torch.float32)
    if memory.rank == 0:
        for tensor in tensors:
            tensor.fill_(-1)
    gather_objects(None)
    for tensor in tensors:
        tensor[rank] = rank
    gather_objects(None)
    return memory.rank, memory.num_ranks, [tensor[:, 0].tolist() for tensor in tensors]


EACH_ALONE = [[0], [1], [2], [3]]
HOSTS = {
    "one host": [[0, 1, 2, 3]],
    "two hosts": [[0, 1], [2, 3]],
    "no memfd": EACH_ALONE,
    "cannot open": EACH_ALONE,
}


@pytest.fixture(scope="module")
def found():
    return run_ranks(written, 4, list(HOSTS))


@pytest.mark.parametrize("how", HOSTS)
def test_what_one_rank_writes_the_others_of_its_host_read(found, how):
    for ranks in HOSTS[how]:
        for place, rank in enumerate(ranks):
            at, size, columns = found[rank][how]
            assert (at, size) == (place, len(ranks))
            for column in columns:
                assert [column[r] for r in ranks] == ranks
                if len(ranks) > 1:
                    assert all(column[r] == -1 for r in range(4) if r not in ranks)


def open_files() -> list[str]:
    """What this process has open, but for what another thread closes meanwhile."""
    links = []
    for file in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{file}"))
    return links


def kept(rank: int) -> tuple[list[int], int, int, int, int]:
    """Megabytes of common memory that count as this rank's while 64 are held, and after; megabytes
    that became its own meanwhile; open files and mappings that stay."""

    def share_and_own() -> tuple[int, int]:
        gather_objects(None)
        held = psutil.Process().memory_maps(grouped=False)
        gather_objects(None)
        # Pages of libraries are not asked for: any process of the machine changes their share.
        share = sum(m.pss for m in held if m.path.startswith("/memfd:weights"))
        own = sum(m.private_dirty for m in held if m.path.startswith("["))
        return round(share / MB), round(own / MB)

    with distributed() as world:
        memory = module.HostMemory.of(world)
        _, own_before = share_and_own()
        tensors = memory.allocate([(16, MB)] * 4, torch.uint8)
        for tensor in tensors:
            tensor[:].fill_(1)  # by all
        share, own = share_and_own()
        shares = [share]
        del tensor
        while tensors:  # one by one, as ZeRO 3 takes them
            tensors.pop()
            gc.collect()
            shares.append(share_and_own()[0])
        mappings = len(re.findall("memfd:weights", Path("/proc/self/maps").read_text()))
        files = sum("memfd:weights" in link for link in open_files())
        return shares, own - own_before, files, mappings, memory.num_ranks


def test_it_is_there_once_and_goes_with_its_last_tensor():
    for shares, own, files, mappings, num_ranks in run_ranks(kept, 2):
        assert num_ranks == 2 and files == 0 and mappings == 0
        assert shares == [32, 24, 16, 8, 0], "halves of 64, 48, .."
        assert own < 32, "of two ranks, one that holds a copy of its own"


def test_a_process_alone_allocates_as_ever():
    (((_, size, _),),) = (found.values() for found in run_ranks(written, 1, ["one host"]))
    assert size == 1 and LOCAL.first_error("a problem") == "a problem"


class Model(nn.Module):
    """Large and small, tied, trained."""

    def __init__(self, _: object = None) -> None:
        super().__init__()
        for n in range(5):
            setattr(self, f"large{n}", nn.Parameter(torch.randn(40 + n, 1024)))
        self.alias = self.large0
        self.small = nn.Parameter(torch.randn(7))
        self.trains = nn.Parameter(torch.randn(64, 512))


def loaded(rank: int, folder: str) -> tuple[dict, int, str]:
    """What a rank has, the bytes that it read, and what it says of a damaged folder."""
    read = []
    read_into = StoredTensor.read_into

    def counted(self, target, first_row=0):
        read.append(target.numel() * self.dtype.itemsize)
        read_into(self, target, first_row)

    StoredTensor.read_into = counted
    with distributed() as world:
        memory = module.HostMemory.of(world)
        answer = ""
        for name in ("good", "bad"):
            model = meta_model(Model, None)
            for key, parameter in model.named_parameters():
                parameter.requires_grad_(key == "trains")
            weights = Weights(Path(folder) / name, KeyMap(()), model)
            targets = materialise(model, torch.bfloat16, memory)
            try:
                weights.fill(targets, memory)
            except CheckpointError as error:
                answer = str(error)
            else:
                state = {n: p.detach().clone() for n, p in model.named_parameters()}
                size, tied = sum(read), model.alias is model.large0
                assert tied and {n for n, t in targets.items() if t.is_common} == {
                    f"large{n}" for n in range(5)
                }
    return state, size, answer


def test_each_rank_reads_a_part_of_what_is_common(tmp_path):
    torch.manual_seed(0)
    tensors = {n: p.detach() for n, p in Model().named_parameters()}
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    save_file(tensors, tmp_path / "good/model.safetensors")
    save_file(
        tensors | {"large4": tensors["large4"] * torch.nan}, tmp_path / "bad/model.safetensors"
    )
    found = run_ranks(loaded, 3, str(tmp_path))
    own = sum(tensors[n].nbytes for n in ("small", "trains"))
    common = sum(t.nbytes for t in tensors.values()) - own
    assert sum(size for _, size, _ in found) == common + 3 * own
    assert max(size for _, size, _ in found) < own + common / 2
    for state, _, answer in found:
        assert "model.safetensors: large4 holds NaN" in answer
        assert state.keys() == tensors.keys()
        for name, tensor in tensors.items():
            dtype = torch.float32 if name == "trains" else torch.bfloat16
            assert torch.equal(state[name], tensor.to(dtype)), name
