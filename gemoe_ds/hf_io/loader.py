"""A Hugging Face folder and the model it fills: every rank reads what it keeps, and nothing else.

`Weights` is checked as a whole (headers, keys, shapes) before the first byte of a tensor is read.
rewriter.py goes the other way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import accumulate, islice, zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from gemoe_ds.console import Progress
from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.allocator import LOCAL, Peers, WeightAllocator
from gemoe_ds.hf_io.key_rules import KeyMap, Shape, StoredSlice
from gemoe_ds.hf_io.quantised_tensor import with_scales
from gemoe_ds.hf_io.read_ahead import reading
from gemoe_ds.hf_io.safetensors_reader import StoredTensor, open_stored
from gemoe_ds.hf_io.targets import Target
from gemoe_ds.progress import PROGRESS

_AHEAD = 16  # slices, of a few megabytes as a rule, that the disk brings while others are read
_WORTH_SHARING = 2**16  # bytes; pages of 4096 are shared


class Weights:
    """What a folder has for the parameters of `model`, which may be a meta model.

    Raises CheckpointError naming the folder and the file or key if anything is missing, damaged,
    unexpected or of another shape.
    """

    def __init__(
        self, folder: Path, keys: KeyMap, model: nn.Module, may_lack: Sequence[str] = ()
    ) -> None:
        """`may_lack`: patterns of names that a folder may have none of, whose parameters have
        memory and values then."""
        self.folder = folder
        self.shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        name_of = {id(p): name for name, p in model.named_parameters()}
        # a tied parameter has several names; a file may have it under all of them
        names = {n: name_of[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
        tied = {also: name for also, name in names.items() if also != name}
        try:
            self.raw: dict[str, StoredTensor] = open_stored(folder)
            self.stored = with_scales(self.raw)
            shapes = {key: tensor.shape for key, tensor in self.stored.items()}
            self.keys = keys.fitting(shapes, self.shapes)
            wanted = self._present(may_lack)
            self.slices = self.keys.slices(shapes, wanted, optional=tied)
            self.tied_copies = self._tied_copies(tied)
            self._refuse_integers()
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{folder}: ")
            raise CheckpointError(f"model.checkpoint={folder}: {reason}") from error
        place = {key: number for number, key in enumerate(self.stored)}
        self.slices.sort(key=lambda piece: (place[piece.key], piece.row or 0))

    def _present(self, may_lack: Sequence[str]) -> dict[str, Shape]:
        """The parameters without those that may be left out and are."""
        some = {n for n in self.shapes if any(fnmatchcase(n, pattern) for pattern in may_lack)}
        if any(piece.key in self.stored for n in some for piece in self.keys.of(n, self.shapes[n])):
            return self.shapes
        return {name: shape for name, shape in self.shapes.items() if name not in some}

    def _tied_copies(self, tied: Mapping[str, str]) -> list[StoredSlice]:
        """What is stored of tied parameters under their other names; it must be the same."""
        found = []
        for also, name in tied.items():
            for piece in self.keys.of(also, self.shapes[name]):
                (first, *_) = (p.key for p in self.slices if p.name == name)
                if piece.key in self.stored and piece.key != first:
                    if not self.stored[piece.key].equals(self.stored[first]):
                        raise CheckpointError(
                            f"{piece.key} differs from {first}, but config.json says that they are "
                            "one (tie_word_embeddings); if they are two, set it to false there"
                        )
                    found.append(replace(piece, name=name))
        return found

    def _refuse_integers(self) -> None:
        for piece in self.slices:
            dtype = self.stored[piece.key].dtype
            if not dtype.is_floating_point:
                raise CheckpointError(
                    f"{piece.key} is stored as {str(dtype).removeprefix('torch.')}, and weights "
                    "are floating-point numbers; a quantised model must be converted back first"
                )

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One whole parameter, for this process alone."""
        shape = self.shapes[name]
        tensor = torch.empty(shape, dtype=dtype)
        self.fill({name: Target(tensor, shape)})
        return tensor

    def fill(
        self,
        targets: Mapping[str, Target],
        memory: WeightAllocator = LOCAL,
        *,
        show_progress: bool = False,
    ) -> None:
        """Read every target in the order in which it stands on the disk, or receive it from the
        rank that does. Collective: what is wrong with a weight all ranks raise."""
        slices = [p for p in self.slices if p.name in targets and targets[p.name].holds(p)]
        rows = {n: (t.first_row, len(t.tensor)) for n, t in targets.items() if t.is_some_rows}
        size_of = {id(p): targets[p.name].num_bytes(p, self.stored[p.key]) for p in slices}
        problem = None
        with memory.sharing(repr(rows)) as sharing:
            received: dict[Peers, list[StoredSlice]] = {
                peers: [] for peers in (sharing.whole, sharing.rows, sharing.common)
            }
            common = [p for p in slices if targets[p.name].is_common]
            of_others = _of_others(common, [size_of[id(p)] for p in common], sharing.part)
            for piece in slices:
                if piece.name in rows:
                    received[sharing.rows].append(piece)
                elif not targets[piece.name].is_common:
                    received[sharing.whole].append(piece)
                elif id(piece) not in of_others:
                    received[sharing.common].append(piece)
            with Progress(
                total=sum(size_of[id(p)] for pieces in received.values() for p in pieces),
                desc="loading",
                unit="B",
                unit_scale=True,
                disable=not show_progress,
            ) as bar:
                for peers, pieces in received.items():
                    problem = self._receive(pieces, targets, peers, bar) or problem
            problem = memory.first_error(problem)
        if problem:
            raise CheckpointError(problem)

    def _receive(
        self,
        slices: list[StoredSlice],
        targets: Mapping[str, Target],
        peers: Peers,
        bar: Progress,
    ) -> str | None:
        """Fill these, each read by one of the peers; or what is wrong with one that this rank read.

        Peers read ahead, each its own files, and broadcast in turn. Collective among them.
        """
        reader_of = self._readers(peers.size)
        of_readers: list[list[StoredSlice]] = [[] for _ in range(peers.size)]
        for piece in slices:
            of_readers[reader_of[self.stored[piece.key].file]].append(piece)
        with reading(self._read(of_readers[peers.rank], targets), ahead=peers.size > 1) as mine:
            for turn in zip_longest(*of_readers):
                for reader, piece in enumerate(turn):
                    if piece is None:
                        continue
                    if reader == peers.rank:
                        mine.step()
                        if mine.problem and peers.size == 1:
                            return mine.problem
                    target, stored = targets[piece.name], self.stored[piece.key]
                    view = target.view(piece, stored)
                    peers.broadcast(view, reader)
                    target.done(piece, stored)
                    bar.update(view.nbytes)
                    PROGRESS.num_events += 1
        return mine.problem or None

    def _readers(self, num_peers: int) -> dict[Path, int]:
        """Who reads a file: ranks of one host for every kind of weight, so that it has it once."""
        files = sorted({tensor.file for tensor in self.stored.values()})
        return {file: number * num_peers // len(files) for number, file in enumerate(files)}

    def _read(self, slices: list[StoredSlice], targets: Mapping[str, Target]) -> Iterator[None]:
        ahead = iter(slices)
        self._prefetch(islice(ahead, _AHEAD))
        for piece in slices:
            self._prefetch(islice(ahead, 1))
            stored, target = self.stored[piece.key], targets[piece.name]
            if problem := target.read(piece, stored):
                dtype = str(target.tensor.dtype).removeprefix("torch.")
                raise CheckpointError(
                    f"model.checkpoint={self.folder}: {stored.file.name}: {piece.key} {problem} "
                    f"(for {piece.name}, as {dtype}); download it again, or convert it again"
                )
            yield

    def _prefetch(self, slices: Iterable[StoredSlice]) -> None:
        for piece in slices:
            stored = self.stored[piece.key]
            stored.prefetch(piece.stored_rows(stored.shape))


def _of_others(common: list[StoredSlice], sizes: list[int], part: tuple[int, int]) -> set[int]:
    """Of what ranks have in common the ids of those that others fill, as many bytes each."""
    mine, num_parts = part
    begins = accumulate(sizes, initial=0)
    parts = [num_parts * begin // sum(sizes) for begin, _ in zip(begins, sizes, strict=False)]
    return {id(p) for p, part in zip(common, parts, strict=True) if part != mine}


def materialise(
    model: nn.Module, dtype: torch.dtype, memory: WeightAllocator = LOCAL
) -> dict[str, Target]:
    """Give every parameter without memory some: float32 if it trains, `dtype` if it does not.

    Large ones that do not train are in `memory`. Returns them by name; a tied parameter once.
    Parameters that have memory stay as they are. Collective if the memory is common.
    """
    on_meta = {n: p for n, p in model.named_parameters() if p.is_meta}
    # 1. memory for large parameters that do not train
    large = [
        name
        for name, p in on_meta.items()
        if not p.requires_grad and p.numel() * dtype.itemsize >= _WORTH_SHARING
    ]
    allocated = memory.allocate([tuple(on_meta[name].shape) for name in large], dtype)
    common = dict(zip(large, allocated, strict=True))
    # 2. a parameter there, or in memory of its own
    targets, made = {}, {}
    for name, p in on_meta.items():
        kept = torch.float32 if p.requires_grad else dtype
        tensor = common[name] if name in common else torch.empty(p.shape, dtype=kept)
        made[id(p)] = nn.Parameter(tensor, requires_grad=p.requires_grad)
        targets[name] = Target(made[id(p)], tuple(p.shape), is_common=name in common)
    # 3. in the place of the old one, under all of its names
    for name, p in list(model.named_parameters(remove_duplicate=False)):
        if p.is_meta:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made[id(p)])
    return targets
