"""Tensors under other names, none of them touched before it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor


class Renamed(Mapping[str, Tensor]):
    """Those of `tensors` that `names` has, a name there by its name here."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
