"""The lengths of whatever a run reads: a folder, a mixture of them, or some of their rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gemoe_ds.data.bad_samples import Gather, alone
from gemoe_ds.data.collate import Collator
from gemoe_ds.data.lengths import Lengths, file_name, keep, known_lengths
from gemoe_ds.data.mixture import Mixture, SampleList, Subset
from gemoe_ds.data.sample import SampleFolder
from gemoe_ds.errors import writing_to


def lengths_of(
    samples: SampleList,
    collator: Collator,
    *,
    rank: int = 0,
    world: int = 1,
    gather: Gather = alone,
    output: Path | None = None,
    may_write: bool = False,
    stops: Callable[[], bool] = lambda: False,
) -> tuple[Lengths | None, list[Path]]:
    """On the first rank the lengths, and the files that they are kept in: one of each folder.

    See `known_lengths`. Files are looked for in `output` too, and written there (`may_write`) where
    a folder cannot be written to. Collective.
    """
    if isinstance(samples, Subset):
        whole, files = lengths_of(
            samples.samples,
            collator,
            rank=rank,
            world=world,
            gather=gather,
            output=output,
            may_write=may_write,
            stops=stops,
        )
        return whole and whole.of_rows(samples.row_M), files
    folders = samples.folders if isinstance(samples, Mixture) else (samples,)
    found: dict[Path, Lengths | None] = {}
    files = []
    for folder in folders:
        assert isinstance(folder, SampleFolder), "what is on disk"
        if folder.path in found:
            continue
        others = [output] if output else []
        lengths, file = known_lengths(
            folder, collator, rank=rank, world=world, gather=gather, others=others, stops=stops
        )
        if lengths is not None and file is None and output and may_write:
            with writing_to(output):
                output.mkdir(parents=True, exist_ok=True)
            file = keep(lengths, output / file_name(folder, collator))
        found[folder.path] = lengths
        files += [file] if file else []
    parts = [part for folder in folders if (part := found[Path(folder.path)]) is not None]
    if len(parts) < len(folders):
        return None, files
    return (Lengths.joined(parts) if len(parts) > 1 else parts[0]), files
