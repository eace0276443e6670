"""Time the writing of answers beside stock transformers, at k = 8 and at fewer experts a token.

    python -m benchmarks.generation              writes results/generation_cpu.json, or _cuda

The model is OLMoE's: 4 layers, width 1024, 64 experts of width 512, random weights. Contenders are
transformers as it comes and with its other ways to run experts, our model, and an exported folder's
own code. First all are compared on two such layers in float32: the same logits, the same tokens.
Then they take turns, round after round, in bfloat16. On a CPU the seconds are those that the
process computed, on one thread, so that other work of the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import CHECKOUT
from benchmarks.answers import TOP_K, WORDS, write_model
from benchmarks.contenders import PAPER_K
from benchmarks.generation_contenders import Contender, OfTransformers, Ours, stock_experts
from benchmarks.timing import Timing, free_memory, measure, paired
from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.files import write_text
from gemoe_ds.parser import Parser, at_least_one

_CLOCK = "wall" if torch.cuda.is_available() else "process"
SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_experts": 64,
    "vocab_size": 1024,
}
MEAN_KS = (PAPER_K, 3.0)
STOCK, BOUND = "transformers", 1e-3  # of a logit's difference in float32
ROUNDING = 1.5  # how many times as far from float32 as stock in bfloat16 another may be


@dataclass(frozen=True)
class Setting:
    name: str
    batch: int
    prompt: int
    new: int

    def ids_BS(self, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        ids_BS = torch.randint(3, len(WORDS), (self.batch, self.prompt), generator=generator)
        return ids_BS.to(device)

    @property
    def tokens(self) -> int:
        """That count in tokens a second: those written, or read where one is written."""
        return self.batch * (self.new if self.new > 1 else self.prompt)


SETTINGS = (
    Setting("batch 1", 1, 8, 17),
    Setting("batch 8", 8, 8, 9),
    Setting("batch 32", 32, 8, 9),
    Setting("prefill 512", 1, 512, 1),
)
CHECKED = Setting("checked", 3, 12, 8)
CHECKED_LAYERS = 2


@dataclass(frozen=True)
class Way:
    """One contender with its routing or its experts: `ready` is called before its turn."""

    contender: Contender
    ready: Callable[[], None]
    mean_k: float = TOP_K


class Ways:
    """All of a dtype, by name."""

    def __init__(self, base: Path, place: Path, dtype: str) -> None:
        self.stock, self.ours = OfTransformers(base, dtype), Ours(base, dtype)
        folders = {r: place / r for r in ("top_k", "gemoe")}
        for router, out in folders.items():
            if not out.exists():
                self.ours.export(router, base, out)
        self.exported = {r: OfTransformers(out, dtype, own_code=True) for r, out in folders.items()}

    def at(self, setting: Setting, device: torch.device) -> dict[str, Way]:
        """The dial of GeMoE is set to each mean k on the very prompts and answers."""
        stock, ours, exported = self.stock, self.ours, self.exported
        default = stock.default_experts
        ways = {STOCK: Way(stock, partial(stock.with_experts, default))}
        for name in stock_experts():
            if name != default:
                ways[f"{STOCK}, {name}"] = Way(stock, partial(stock.with_experts, name))
        ways[f"gemoe_ds, k {TOP_K}"] = Way(ours, partial(ours.with_router, "top_k"))
        ways[f"exported, k {TOP_K}"] = Way(exported["top_k"], lambda: None)
        ids_BS = setting.ids_BS(device)
        for mean_k in MEAN_KS:
            budget = ours.budget(mean_k, ids_BS, setting.new)
            found = ours.count(ids_BS, setting.new)
            ways[f"gemoe_ds, k {mean_k:g}"] = Way(
                ours, partial(ours.with_router, "gemoe", budget), found
            )
            ways[f"exported, k {mean_k:g}"] = Way(
                exported["gemoe"], partial(budget.apply, exported["gemoe"].routers), found
            )
        return ways


def check(ways: dict[str, Way], setting: Setting, device: torch.device) -> dict[str, float]:
    """The largest difference of a logit from stock at the same k, or from ours where k is fewer.

    ConfigError if it is too large for rounding in float32, or a token is another.
    """
    ids_BS, found, firsts = setting.ids_BS(device), {}, dict[float, tuple[Tensor, Any]]()
    for name, way in ways.items():
        way.ready()
        logits_BSV = way.contender.logits(ids_BS)
        written = way.contender.written(ids_BS, setting.new)
        want_BSV, want = firsts.setdefault(way.mean_k, (logits_BSV, written))
        found[name] = float((logits_BSV - want_BSV).abs().max())
        if found[name] > BOUND or written != want:
            raise ConfigError(
                f"{name}: logits differ by {found[name]:.2g} in float32, and {written} is written "
                f"where {want} is wanted; so there is nothing to time"
            )
    return found


def rounding(
    ways: dict[str, Way], wide: dict[str, Tensor], setting: Setting, device: torch.device
) -> dict[str, float]:
    """How far bfloat16's logits are from float32's, as a share of their norm.

    ConfigError for one that is much farther off than stock's.
    """
    ids_BS, found = setting.ids_BS(device), dict[str, float]()
    for name, way in ways.items():
        if way.mean_k != TOP_K:
            continue  # rounding moves some tokens' k
        way.ready()
        want_BSV = wide[name]
        found[name] = float((way.contender.logits(ids_BS) - want_BSV).norm() / want_BSV.norm())
        if found[name] > ROUNDING * found[STOCK]:
            raise ConfigError(
                f"{name}: {found[name]:.2g} from float32, stock {found[STOCK]:.2g}; so there is "
                "nothing to time"
            )
    return found


def rows_of(
    setting: Setting, ways: dict[str, Way], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    ids_BS = setting.ids_BS(device)
    skipped = {name: why for name in ways if (why := _too_large(name, setting))}
    runs: dict[str, Callable[[], Any]] = {
        name: partial(way.contender.written, ids_BS, setting.new)
        for name, way in ways.items()
        if name not in skipped
    }
    clock = time.perf_counter if _CLOCK == "wall" else time.process_time
    timings = measure(runs, rounds, clock=clock, before=lambda name: ways[name].ready())
    rows = [{"setting": setting.name, "contender": n, "not_run": w} for n, w in skipped.items()]
    for name, timing in timings.items():
        rows.append(_row(setting, name, ways[name].mean_k, timing, timings[STOCK]))
        print(
            f"{setting.name}, {name}: {rows[-1]['tokens_per_s']:g} tokens/s, "
            f"{rows[-1]['of_stock']:.2f} of stock",
            flush=True,
        )
    return rows


def _row(
    setting: Setting, name: str, mean_k: float, timing: Timing, stock: Timing
) -> dict[str, Any]:
    ratio = paired(lambda other, own: other / own, stock, timing)
    return {
        "setting": setting.name,
        "contender": name,
        "mean_k": round(mean_k, 2),
        "tokens_per_s": round(setting.tokens / timing.median, 1),
        "of_stock": round(ratio, 3),
    } | timing.row()


def _too_large(name: str, setting: Setting) -> str | None:
    """batched_mm copies the weights of every assignment."""
    if not name.endswith("batched_mm"):
        return None
    tokens = setting.batch * setting.prompt
    needed = 2 * 3 * tokens * TOP_K * SHAPE["hidden_size"] * SHAPE["intermediate_size"]
    if needed < min(free_memory() // 2, 2**32):
        return None
    return f"it copies {needed / 1e9:.1f} GB of weights a layer"


def main(argv: list[str]) -> None:
    parser = Parser("python -m benchmarks.generation", description=__doc__)
    parser.add_argument("--rounds", type=at_least_one, default=5, help="timed rounds (5)")
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--settings", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--out", type=Path, help="default: results/generation_DEVICE.json")
    parser.add_argument("--keep", action="store_true", help="keep the file's other settings")
    flags = parser.parse_or_exit(argv)
    with exit_on_error():
        origin = provenance()  # before its own results make it dirty
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(1)
        out = flags.out or CHECKOUT / f"results/generation_{device}.json"
        data = origin | {"device": str(device), "threads": torch.get_num_threads()}
        data |= {"shape": SHAPE | {"top_k": TOP_K}, "clock": _CLOCK}
        rows = json.loads(out.read_bytes())["rows"] if flags.keep else []
        for found in run(flags, device):  # written each time: a long run may be stopped
            data |= found.pop("checked", {})
            new = found.get("rows", [])
            rows = new + [row for row in rows if row["setting"] not in {r["setting"] for r in new}]
            rows.sort(key=lambda row: names.index(row["setting"]))
            write_text(out, json.dumps(data | {"rows": rows}, indent=1) + "\n")


def run(flags: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """First what was checked, then the rows of each setting."""
    with tempfile.TemporaryDirectory() as name:
        yield {"checked": checked(Path(name), device)}
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        write_model(base, "bfloat16", **SHAPE)
        ways = Ways(base, Path(name), "bfloat16")
        for setting in SETTINGS:
            if setting.name in flags.settings:
                yield {"rows": rows_of(setting, ways.at(setting, device), flags.rounds, device)}


def checked(place: Path, device: torch.device) -> dict[str, Any]:
    """How far all are from each other on a smaller model; ConfigError if it is too far."""
    base = place / "base"
    write_model(base, "bfloat16", **SHAPE | {"num_hidden_layers": CHECKED_LAYERS})
    ways = Ways(base, place, "float32").at(CHECKED, device)
    wide = check(ways, CHECKED, device)
    print(f"float32: the same tokens, logits to {max(wide.values()):.1g}", flush=True)
    want = {}
    for name, way in ways.items():
        way.ready()
        want[name] = way.contender.logits(CHECKED.ids_BS(device))
    narrow = Ways(base, place, "bfloat16").at(CHECKED, device)
    off = rounding(narrow, want, CHECKED, device)
    return {"float32_logits_differ": wide, "bfloat16_from_float32": off}


if __name__ == "__main__":
    main(sys.argv[1:])
