"""How a checkpoint's keys map onto a model's parameters: rules as data, read in both directions.

A rule names a stored key and one of our parameters. `{l}` stands for a number and `{*}` for any
text, the same on both sides. `{e}` on the stored side only says that ours stacks those tensors:
number e is row e of ours. Patterns are einops', from the stored tensor to ours, so the way back is
the pattern with its sides exchanged.

    Rule("{*}.experts.{e}.gate_proj.weight", "{*}.experts.gate_up_proj", part=(0, 2))

says: expert e's gate is the first half of row e of gate_up_proj. Experts are stored in one of
several ways, each of which is a table of its own (`expert_tables`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache

import torch
from torch import Tensor

from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.axes import AxesError, rearrange

Shape = tuple[int, ...]
_FIELD = re.compile(r"\{(\w+|\*)\}")


@dataclass(frozen=True)
class Rule:
    """One line of a backbone's table; of all rules the first whose `ours` fits counts."""

    stored: str
    ours: str
    part: tuple[int, int] | None = None  # ours (or its row) is n stored ones in a row: number i
    stored_part: tuple[int, int] | None = None  # the stored one is n of ours in a row: number i
    by_row: bool = False  # row e of the stored tensor is row e of ours, so experts can be picked
    rearrange: str | None = None  # einops: stored (part, row) -> ours (part, row)
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)  # of axes that it splits

    def fields(self, name: str) -> dict[str, str] | None:
        """What the placeholders stand for in one of our names; None if the rule does not fit."""
        match = re.fullmatch(_regex(self.ours), name)
        return match and {
            key: match[group]
            for group, key in zip(match.re.groupindex, _FIELD.findall(self.ours), strict=True)
        }

    @property
    def stacks(self) -> bool:
        return "{e}" in self.stored and "{e}" not in self.ours

    def key(self, fields: Mapping[str, str], row: int | None) -> str:
        """The stored key."""
        known = dict(fields) | ({} if row is None else {"e": str(row)})
        return _FIELD.sub(lambda match: known[match[1]], self.stored)


def _regex(pattern: str) -> str:
    """A regular expression with one group a placeholder."""
    pieces, end = [], 0
    for number, match in enumerate(_FIELD.finditer(pattern)):
        pieces.append(re.escape(pattern[end : match.start()]))
        pieces.append(f"(?P<f{number}>{'.+' if match[1] == '*' else '[0-9]+'})")
        end = match.end()
    return "".join(pieces) + re.escape(pattern[end:])


@dataclass(frozen=True)
class StoredSlice:
    """A part of a stored tensor, and the part of ours that it is."""

    key: str
    name: str
    row: int | None  # of ours: an expert's number; None: all of it
    rule: Rule

    def ours(self, tensor: Tensor, first_row: int = 0) -> Tensor:
        """The view of our tensor, of which rows from `first_row` on are here."""
        view = tensor if self.row is None else tensor[self.row - first_row]
        return view if self.rule.part is None else _part(view, self.rule.part)

    def stored_rows(self, shape: Shape) -> slice | None:
        """Which rows of a stored tensor of this shape; None: all."""
        if self.rule.by_row:
            assert self.row is not None
            return slice(self.row, self.row + 1)
        if self.rule.stored_part is None:
            return None
        index, count = self.rule.stored_part
        size = shape[0] // count
        return slice(index * size, (index + 1) * size)

    def to_ours(self, stored: Tensor) -> Tensor:
        """`stored` (its rows of `stored_rows`) as ours has it."""
        if self.rule.by_row:
            stored = stored[0]
        if self.rule.rearrange is None:
            return stored
        return rearrange(stored, self.rule.rearrange, **self.rule.sizes)

    def to_stored(self, ours: Tensor) -> Tensor:
        """The way back."""
        if self.rule.rearrange is not None:
            left, right = self.rule.rearrange.split("->")
            ours = rearrange(ours, f"{right} -> {left}", **self.rule.sizes)
        return ours[None] if self.rule.by_row else ours


def _part(tensor: Tensor, part: tuple[int, int]) -> Tensor:
    index, count = part
    return tensor.chunk(count)[index]


@dataclass(frozen=True)
class KeyMap:
    """A backbone's table, and the stored keys that nothing here needs (shell patterns).

    `experts` are tables of the same parameters, the published one first. A folder follows one of
    them: `fitting` says which; until then it is the first.
    """

    rules: Sequence[Rule] = ()
    unused: Sequence[str] = ()
    experts: Sequence[tuple[Rule, ...]] = ()

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        return (*(self.experts[0] if self.experts else ()), *self.rules)

    @property
    def one_expert_each(self) -> KeyMap:
        """With the table of experts alone that stores each by itself, outputs by inputs."""
        fit = (t for t in self.experts if all(rule.stacks and not rule.rearrange for rule in t))
        return KeyMap((*next(fit, ()), *self.rules), self.unused)

    def fitting(self, stored: Mapping[str, Shape], ours: Mapping[str, Shape]) -> KeyMap:
        """With the table of experts alone whose keys are stored, in the shapes that it wants.

        Judged as a whole: a square gate_up_proj fits either way round, but then down_proj is
        twice as long as wide. If none fits, the one of which most is there: it names what is not.
        """
        found = []
        for table in self.experts:
            keys = KeyMap((*table, *self.rules), self.unused)
            slices = [
                piece
                for name, shape in ours.items()
                if any(rule.fields(name) is not None for rule in table)
                for piece in keys.of(name, shape)
            ]
            there = [p for p in slices if p.key in stored]
            fit = [p for p in there if _fits(p.rule, stored[p.key], ours[p.name])]
            total = max(len(slices), 1)
            found.append(((len(there) / total, len(fit) / total), keys))
        return max(found, key=lambda scored: scored[0])[1] if found else self

    def slices(
        self,
        stored: Mapping[str, Shape],
        ours: Mapping[str, Shape],
        optional: Iterable[str] = (),
    ) -> list[StoredSlice]:
        """What makes up all of `ours` (names and shapes); CheckpointError if it does not fit.

        Every key must be there and of the right shape, and every stored one used, on the list of
        unused ones or that of an `optional` name.
        """
        slices = [piece for name, shape in ours.items() for piece in self.of(name, shape)]
        wanted = {piece.key for piece in slices}
        missing = [piece for piece in slices if piece.key not in stored]
        if missing:
            number = len({piece.key for piece in missing})
            raise CheckpointError(
                f"missing: {missing[0].key} (for {missing[0].name}; {number} of {len(wanted)} keys)"
                f"{_why_missing(missing[0].key, wanted, stored)}"
            )
        known = wanted | {piece.key for name in optional for piece in self.of(name, ())}
        extra = [
            key
            for key in stored
            if key not in known and not any(fnmatchcase(key, p) for p in (*self.unused, *_COMPUTED))
        ]
        if extra:
            raise CheckpointError(f"unexpected: {extra[0]} ({len(extra)} of {len(stored)} keys)")
        for piece in slices:
            _check_shape(piece, stored[piece.key], ours[piece.name])
        return slices

    def stored_shapes(self, ours: Mapping[str, Shape]) -> dict[str, Shape]:
        """The folder that would fit: every key and its shape."""
        found: dict[str, Shape] = {}
        for name, shape in ours.items():
            tensor = torch.empty(shape, device="meta")
            for piece in self.of(name, shape):
                stored = list(piece.to_stored(piece.ours(tensor)).shape)
                if piece.rule.by_row:
                    stored[0] = shape[0]
                elif piece.rule.stored_part:
                    stored[0] *= piece.rule.stored_part[1]
                found[piece.key] = tuple(stored)
        return found

    def of(self, name: str, shape: Shape) -> Iterable[StoredSlice]:
        """The slices of one of our parameters, whose (whole) shape this is."""
        for rule in self.all_rules:
            fields = rule.fields(name)
            if fields is None:
                continue
            together = [r for r in self.all_rules if r.ours == rule.ours]
            rows = range(shape[0]) if rule.stacks or rule.by_row else (None,)
            return [StoredSlice(r.key(fields, row), name, row, r) for row in rows for r in together]
        return [StoredSlice(name, name, None, Rule("{*}", "{*}"))]


@lru_cache(maxsize=2**14)  # a stack has thousands of slices, all alike
def _fits(rule: Rule, stored: Shape, ours: Shape) -> bool:
    """Whether a stored tensor of this shape makes its part of ours, by shapes alone."""
    if rule.stored_part and (not stored or stored[0] % rule.stored_part[1]):
        return False
    if rule.by_row and stored[:1] != ours[:1]:
        return False
    piece = StoredSlice("", "", 0 if rule.stacks or rule.by_row else None, rule)
    try:
        found = piece.to_ours(torch.empty(stored, device="meta")[piece.stored_rows(stored) or ...])
        return found.shape == piece.ours(torch.empty(ours, device="meta")).shape
    except (AxesError, IndexError):
        return False


def _check_shape(piece: StoredSlice, stored: Shape, ours: Shape) -> None:
    if not _fits(piece.rule, stored, ours):
        wanted = piece.ours(torch.empty(ours, device="meta")).shape
        raise CheckpointError(
            f"{piece.key} has shape {list(stored)}, which does not make {list(wanted)} of "
            f"{piece.name}, as config.json has it; give the weights and the config of one model"
        )


_COMPUTED = ("*rotary_emb.inv_freq",)  # buffers that old files hold and that config.json implies
_WRAPPERS = {
    "module.": "DistributedDataParallel or DeepSpeed put it there; save model.module",
    "base_model.model.": "PEFT put it there; save what merge_and_unload() returns",
    "_orig_mod.": "torch.compile put it there; save model._orig_mod",
    "_fsdp_wrapped_module.": "FSDP put it there; save the full state_dict",
}


def _why_missing(first: str, wanted: set[str], stored: Iterable[str]) -> str:
    """Where the keys are there under other names: what stands before them, and who does so."""
    stored = set(stored)
    if any(".lora_A." in key for key in stored):
        return "; there is an adapter of PEFT in it: save what merge_and_unload() returns"
    longer = {key.removesuffix(first) for key in stored if key.endswith(f".{first}")}
    for prefix in sorted(longer):
        if 2 * sum(f"{prefix}{key}" in stored for key in wanted) > len(wanted):
            by = [reason for wrapper, reason in _WRAPPERS.items() if wrapper in prefix]
            way_out = by[0] if by else "rename the keys"
            return f"; the keys begin with {prefix!r}: {way_out}, or take it off the keys"
    for prefix in ("model.", "language_model.", "transformer."):
        bare = [key for key in wanted if key.startswith(prefix)]
        if bare and 2 * sum(key.removeprefix(prefix) in stored for key in bare) > len(wanted):
            return f"; the keys lack {prefix!r}: save the whole model, with its head"
    if first.endswith("lm_head.weight"):
        return "; if the head is the embedding, set tie_word_embeddings to true in config.json"
    return ""


EXCHANGED = "i o -> o i"  # inputs before outputs are stored
SWIGLU = ("gate_proj", "up_proj", "down_proj")


def swiglu_experts(
    stored: str, ours: str, matrices: tuple[str, str, str] = SWIGLU
) -> tuple[Rule, ...]:
    """The public layout of most families: three `matrices` an expert under `stored`.{e}.

    `ours` is the module with gate_up_proj (gate rows above up rows) and down_proj, stacked.
    """
    gate, up, down = (f"{stored}.{{e}}.{matrix}.weight" for matrix in matrices)
    return (
        Rule(gate, f"{ours}.gate_up_proj", part=(0, 2)),
        Rule(up, f"{ours}.gate_up_proj", part=(1, 2)),
        Rule(down, f"{ours}.down_proj"),
    )


def fused_qkv(stored: str, ours: str) -> tuple[Rule, ...]:
    """Queries, keys and values that are stored as one; `ours` is a pattern with {name}."""
    return tuple(
        Rule(stored, ours.replace("{name}", f"{letter}_proj"), stored_part=(i, 3))
        for i, letter in enumerate("qkv")
    )


def expert_tables(
    stored: str,
    ours: str,
    published: str = "per expert",
    matrices: tuple[str, str, str] = SWIGLU,
) -> tuple[tuple[Rule, ...], ...]:
    """The ways in which folders hold SwiGLU experts, the `published` one first.

    "per expert": three matrices each; "fused": gate_up_proj [E, 2 F, D] and down_proj [E, D, F], as
    transformers 5 has them in memory and writes some; "transposed": [E, D, 2 F] and [E, F, D], as
    transformers 4 had them.
    """
    tables = {"per expert": swiglu_experts(stored, ours, matrices)}
    for kind, pattern in (("fused", None), ("transposed", EXCHANGED)):
        tables[kind] = tuple(
            Rule(f"{stored}.{matrix}", f"{ours}.{matrix}", by_row=True, rearrange=pattern)
            for matrix in ("gate_up_proj", "down_proj")
        )
    return (tables.pop(published), *tables.values())
