"""results/scale.md: what was measured, what is projected from it, and what neither says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Assumed, for the projection alone: what a host reads from shared storage, and receives over gloo.
STORAGE, GLOO, HASHED = 2e9, 1.5e9, 1.5e9  # bytes a second; of all hosts together 40e9 of storage
ALL_STORAGE = 40e9
FOLDERS = {"OLMoE-1B-7B": (13.8e9, 3), "Qwen3-VL-30B-A3B": (61e9, 13)}  # bytes, files
GPUS = (8, 64, 512, 4096)


def page(found: dict[str, Any]) -> str:
    parts = ["# What grows with the number of ranks", _LIMITS]
    if "runs" in found:
        parts += ["## Whole runs on forked ranks", _origin(found["runs"]), *_runs(found["runs"])]
    if "many" in found:
        parts += ["## One rank of many", _origin(found["many"]), _MANY, _many(found["many"])]
    if "reading" in found:
        parts += ["## Bytes read", _origin(found["reading"]), _reading(found["reading"])]
    if found.get("exponents"):
        rows = [(name, f"{value:.2f}") for name, value in found["exponents"].items()]
        parts += ["## Exponents", _EXPONENTS, table(("CPU seconds of", "exponent"), rows)]
    parts += ["## Projected, not measured: loading", _PROJECTED, _projection()]
    return "\n\n".join(parts) + "\n"


_LIMITS = (
    "Measured on two cores with gloo, forked ranks, torch's fake process group and simulated "
    "hosts. **No cluster, no NCCL and no GPU was used.** Seconds are CPU seconds of one process, "
    "which a shared machine changes by tens of percent."
)
_MANY = (
    "The fake group answers every collective at once, so this is the work of the rank itself: "
    "16 layers of OLMoE's gates and predictors, milliseconds."
)
_EXPONENTS = "Slope of log seconds over log ranks, least squares over the rows above."
_PROJECTED = (
    f"Assumed: a host reads {STORAGE / 1e9:g} GB/s from shared storage, which gives all hosts "
    f"together {ALL_STORAGE / 1e9:g} GB/s; a host receives {GLOO / 1e9:g} GB/s over gloo while "
    f"others read; sha256 makes {HASHED / 1e9:g} GB/s. 8 GPUs a host. Seconds."
)


def _origin(part: dict[str, Any]) -> str:
    return f"`{part['command']}`, commit {part['commit']}, {part['machine']}, {part['date']}"


def _runs(part: dict[str, Any]) -> list[str]:
    head = ("ranks", "ZeRO", "resumes", "wall, s", "CPU a rank, s", "start of the first, s")
    head += ("start of the last, s", "a micro-batch, ms", "save of the first, s", "sockets of it")
    rows = [
        (
            row["ranks"],
            row["zero"],
            "yes" if row["resumes"] else "",
            row["wall_s"],
            row["cpu_s_a_rank"],
            row["first"]["start"],
            row["last"]["start"],
            f"{1e3 * row['last']['step'] / row['micro_batches']:.0f}",
            row["first"]["save"],
            row["sockets_of_first"],
        )
        for row in part["rows"]
    ]
    names = sorted({name for row in part["rows"] for c in row["calls"].values() for name in c})
    steps = [
        (
            row["ranks"],
            row["zero"],
            *(f"{row['calls'].get('start', {}).get(n, 0)}" for n in names),
            *(f"{row['calls'].get('step', {}).get(n, 0) / 4:g}" for n in names),
        )
        for row in part["rows"]
        if not row["resumes"] and row["micro_batches"] == 1
    ]
    calls = ("ranks", "ZeRO", *(f"start: {n}" for n in names), *(f"a step: {n}" for n in names))
    return [table(head, rows), "Calls of the last rank:", table(calls, steps)]


def _many(part: dict[str, Any]) -> str:
    head = ("ZeRO", "ranks", "groups", "engine", "moments", "a step")
    return table(
        head,
        [(r["zero"], r["ranks"], *(f"{1e3 * r[name]:.1f}" for name in _MS)) for r in part["rows"]],
    )


_MS = ("groups", "engine", "moments", "step")


def _reading(part: dict[str, Any]) -> str:
    rows = [
        (r["backbone"], r["hosts"], f"{r['folder_bytes'] / 1e9:.1f}", f"{r['read']:.3f}")
        for r in part["rows"]
    ]
    head = ("backbone", "hosts of 8 ranks", "folder, GB", "bytes read, of it")
    return table(head, rows)


def _projection() -> str:
    rows = []
    for name, (size, files) in FOLDERS.items():
        for gpus in GPUS:
            hosts = gpus // 8
            each = max(size / STORAGE, size * hosts / ALL_STORAGE)
            readers = min(hosts, files)
            once = max(size / (readers * STORAGE), size / GLOO if hosts > 1 else 0)
            rows.append(
                (name, gpus, f"{each:.0f}", f"{once:.0f}", f"{size / readers / HASHED:.0f}")
            )
    head = ("folder", "GPUs", "each host reads it", "it is read once", "checksums")
    return table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
