"""results/README.md: every claim of README and docs, its figure, and the command behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.release.claim import Stated
from experiments.release.origin import Origin, origin
from experiments.release.ran import Ran, has_ended
from experiments.release.stages import STAGES, Stage, stage_of

_LONGEST = 240  # characters of a claim that are shown


@dataclass(frozen=True)
class Told:
    """Where a claim comes from, and whether this state of the source gave it."""

    file: str
    origin: Origin
    is_new: bool


def told(root: Path, claim: Stated, ran: dict[str, Ran], source: str) -> list[Told]:
    """One for each file that a claim reads."""
    if hand := claim.by_hand:
        return [Told("", Origin(hand.command, hand.commit, hand.machine, hand.date), is_new=False)]
    return [_told(root, file, ran, source) for file in claim.files]


def _told(root: Path, file: str, ran: dict[str, Ran], source: str) -> Told:
    stage = stage_of(file)
    row = ran.get(stage.name) if stage else None
    if stage is None or row is None or row.seconds is None:
        return Told(file, origin(root, file), is_new=False)
    where = Origin(row.command, row.commit, row.machine, row.date[:10])
    return Told(file, where, is_new=has_ended(ran, stage, source))


def page(root: Path, claims: Sequence[Stated], ran: dict[str, Ran], source: str) -> str:
    """The whole page; `root` is the checkout."""
    rows = [(claim, told(root, claim, ran, source)) for claim in claims]
    new = sum(all(one.is_new for one in where) for _, where in rows)
    by_hand = sum(claim.by_hand is not None for claim in claims)
    return "\n".join(
        [
            "# Results",
            "",
            "`make results` measures all of this again, goes on after any end, writes this page.",
            f"The source is in state `{source}`: a hash over all that can change a result.",
            f"**{new} of {len(rows)} claims were measured on it.** The others come from the commit",
            f"that stands beside them, {by_hand} of them by hand, with no file.",
            "",
            "## What ran",
            "",
            *_table(
                ["part", "command", "took", "source", "commit", "machine", "date", "writes"],
                [_stage_row(stage, ran.get(stage.name), source) for stage in STAGES],
            ),
            "",
            "## Every claim",
            "",
            *_table(
                ["page", "claim", "from", "command", "commit", "machine", "date", "this source"],
                [_claim_row(claim, one) for claim, where in rows for one in where],
            ),
            "",
        ]
    )


def _stage_row(stage: Stage, row: Ran | None, source: str) -> list[str]:
    made = ", ".join(f"[{name}]({name})" for name in stage.makes)
    command = f"`{stage.command}`"
    if row is None or row.seconds is None:
        wants = f"; wants {', '.join(stage.wants)}" if stage.wants else ""
        state = f"{'has begun' if row else 'has not run'}{wants}"
        return [stage.name, command, "", state, "", "", "", made]
    state = "this one" if row.source == source else f"`{row.source}`"
    took = f"{row.seconds / 60:.0f} min"
    return [
        *(stage.name, command, took, state),
        *(_short(row.commit), row.machine, row.date[:10], made),
    ]


def _claim_row(claim: Stated, one: Told) -> list[str]:
    where = one.origin
    return [
        f"[{claim.page}](../{claim.page})",
        shown(claim.words),
        f"[{one.file}]({one.file})" if one.file else "by hand",
        f"`{where.command}`" if where.command else "",
        *(_short(where.commit), where.machine, where.date),
        "yes" if one.is_new else "no",
    ]


def _short(commit: str) -> str:
    name, *dirty = commit.split("-")
    return f"`{'-'.join([name[:10], *dirty])}`" if name else ""


def shown(words: str) -> str:
    """Words as they stand in a cell of the table: the beginning of long ones."""
    short = words if len(words) <= _LONGEST else f"{words[:_LONGEST]} ..."
    return short.replace("|", r"\|")


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows]]
