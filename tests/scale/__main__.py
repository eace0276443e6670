"""What grows with the number of ranks: results/scale.json and scale.md.

`python -m tests.scale` (`make scale`) takes whole runs on up to 64 forked ranks, one rank of up to
4,096 in torch's fake process group, and the loader on up to 512 simulated hosts. Two cores: CPU
seconds of a rank mean something, wall time does not. Nothing here ran on a cluster.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.files import write_text
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.random_checkpoint import write_headers
from tests.helpers import repository
from tests.scale import one_of_many, reading
from tests.scale.page import page
from tests.scale.whole_runs import train_and_resume
from tests.train.resuming import write_setting

RESULTS = repository() / "results/scale.json"
RUNS = ((8, 8), (16, 16), (32, 32), (48, 40), (64, 40))  # ranks, and those of the resumption
MANY = {0: (8, 64, 512, 4096), 2: (8, 64, 512, 4096), 3: (8, 64, 512)}  # ranks by ZeRO stage
HOSTS = (1, 8, 64, 512)
PARTS = ("runs", "many", "reading")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.scale", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--most", type=int, default=10**6, help="leave out what has more ranks")
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 2], help="of whole runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args(argv)
    found = json.loads(flags.out.read_text()) if flags.out.exists() else {}
    for part in flags.parts:
        found[part] = {"rows": _measured(part, flags), **provenance()}
        found["exponents"] = exponents(found)
        write_text(flags.out, json.dumps(found, indent=1))
        write_text(flags.out.with_suffix(".md"), page(found))
    print(f"saved {flags.out} and {flags.out.with_suffix('.md')}")
    return 0


def _measured(part: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if part == "runs":
            setting = write_setting(folder)
            for zero in flags.zero:
                for ranks, then in (pair for pair in RUNS if pair[0] <= flags.most):
                    out = folder / f"zero{zero}-{ranks}"
                    rows += train_and_resume(setting, out, ranks, then, zero=zero)
                    _say(rows[-2:])
        elif part == "many":
            for zero, numbers in MANY.items():
                for ranks in (n for n in numbers if n <= flags.most):
                    rows.append(one_of_many.measure(zero, ranks))
                    _say(rows[-1:])
        else:
            write_headers(Backbone.named("olmoe"), folder, shards=8)
            for hosts in (n for n in HOSTS if reading.RANKS * n <= flags.most):
                rows.append(reading.row("olmoe", folder, hosts))
                _say(rows[-1:])
    return rows


def _say(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        plain = {k: v for k, v in row.items() if not isinstance(v, dict)}
        print("  ".join(f"{key} {value}" for key, value in plain.items()), flush=True)


def exponents(found: dict[str, Any]) -> dict[str, float]:
    """Of seconds ~ ranks ** exponent, from the fewest ranks to the most."""
    said = {}
    many = found.get("many", {}).get("rows", [])
    for zero, most in ((0, 4096), (2, 512), (3, 512)):
        some = {r["ranks"]: r["step"] for r in many if r["zero"] == zero and r["ranks"] <= most}
        if len(some) > 1:
            said[f"step of one rank, ZeRO {zero}, to {max(some)}"] = exponent(some)
    runs = [r for r in found.get("runs", {}).get("rows", []) if not r["resumes"]]
    for zero in sorted({row["zero"] for row in runs}):
        for who in ("first", "last"):
            some = {row["ranks"]: row[who]["start"] for row in runs if row["zero"] == zero}
            if len(some) > 1:
                said[f"start of the {who} rank, ZeRO {zero}, to {max(some)}"] = exponent(some)
    return said


def exponent(seconds: dict[int, float]) -> float:
    """The slope of a straight line through the logarithms."""
    x = [math.log(n) for n in seconds]
    y = [math.log(max(s, 1e-9)) for s in seconds.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return round(top / sum((a - mean_x) ** 2 for a in x), 3)


if __name__ == "__main__":
    sys.exit(main())
