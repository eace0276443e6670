"""A run that is cut and goes on with any other number of ranks, EP size and ZeRO stage.

`python -m tests.train.resuming` (`make resume`) goes from every set-up to every other and writes
results/resume.json; tests/train/test_resume.py does a part of it.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.config.load import config_from_dict
from gemoe_ds.data.sample import Sample, Turn, of_turns, write_samples
from gemoe_ds.errors import GemoeError
from tests.helpers import repository, run_ranks
from tests.tiny import write_base

CUT, NEXT = 3, 20
BOUND = 1e-5  # of every loss that follows: sums in another order, nothing else


@dataclass(frozen=True)
class Setup:
    ranks: int
    ep_size: int
    zero: int

    def __str__(self) -> str:
        return f"{self.ranks}r-ep{self.ep_size}-z{self.zero}"


def all_setups() -> list[Setup]:
    return [
        Setup(ranks, ep_size, zero)
        for ranks, ep_size, zero in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 3))
        if ep_size <= ranks
    ]


def write_data(folder: Path, number: int = 20, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)

    def sample(index: int) -> Sample:
        pixels = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        pixels.save(buffer, "PNG")
        words = [" ".join(rng.choice(list("abcdefgh"), rng.integers(1, 5))) for _ in range(4)]
        turns = (Turn(words[0], words[1], "x"), Turn(words[2], words[3], "y"))
        return of_turns(f"s{index}", buffer.getvalue() if index % 5 else None, turns)

    write_samples(map(sample, range(number)), folder, source="test")
    return folder


def write_setting(root: Path) -> dict[str, Path]:
    hf, tokenizer = write_base(root)
    return {"root": root, "hf": hf, "tokenizer": tokenizer, "data": write_data(root / "data")}


def make_config(setting: dict[str, Path], output: Path, **changes: object):
    tree: dict = {
        "output_dir": str(output),
        "model": {
            "backbone": {"name": "tiny"},
            "checkpoint": str(setting["hf"]),
            "router": {"name": "gemoe"},
            "dtype": "float32",
        },
        "data": {"train_path": str(setting["data"]), "tokenizer": str(setting["tokenizer"])},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "parallel": {"ep_size": 2},
        "train": {"steps": 6, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
        "checkpoint": {"every": CUT, "keep": 50},
        "monitor": {"every": 1, "tensorboard": False},
        "deepspeed": str(repository() / "ds_configs/zero2.json"),
    }
    for path, value in changes.items():
        node = tree
        *parents, last = path.split("__")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return config_from_dict(tree)


def setup_config(setting, output: Path, setup: Setup, train: str, **changes: object):
    return make_config(
        setting,
        output,
        model__trainable=train,
        # An eps that keeps Adam from turning the rounding of a gradient into a step of full size,
        # and a rate at which 20 steps of a whole model do not blow rounding up.
        optim__eps=1e-3,
        optim__lr=1e-2 if train == "routers" else 2e-3,
        optim__predictor_lr=2e-2,
        parallel__ep_size=setup.ep_size,
        train={"steps": CUT + NEXT, "micro_batch_size": 1, "global_batch_size": 4},
        monitor__sample_log=True,
        deepspeed=str(repository() / f"ds_configs/zero{setup.zero}.json"),
        **changes,
    )


@contextmanager
def one_group(module) -> Iterator[None]:
    """`train` of several runs in a row inside one process group: starting one takes seconds."""
    from gemoe_ds.engine.world import distributed

    original = module.distributed
    with distributed() as world:

        @contextmanager
        def kept():
            yield world

        module.distributed = kept
        try:
            yield
        finally:
            module.distributed = original


def train_all(rank: int, configs: list) -> str | None:
    """Train one configuration after the other; what a user would read if one is refused."""
    import gemoe_ds.train.run as module

    with one_group(module):
        for config in configs:
            try:
                module.train(config)
            except GemoeError as error:
                return str(error)
    return None


def losses(output: Path) -> dict[int, float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss/total"] for line in lines}


def whole_run(setting, setup: Setup, train: str) -> tuple[Path, object]:
    output = setting["root"] / f"whole-{train}-{setup}"
    return output, setup_config(setting, output, setup, train)


def cut_run(setting, source: Setup, target: Setup, train: str) -> tuple[Path, object]:
    """A copy of the source's run as it was after `CUT` steps, to go on as `target`."""
    whole, _ = whole_run(setting, source, train)
    output = setting["root"] / f"{train}-{source}-to-{target}"
    step = f"checkpoints/step-{CUT:06d}"
    shutil.copytree(whole / step, output / step)
    shutil.copytree(whole / "sample_log", output / "sample_log")
    shutil.copy(whole / "metrics.jsonl", output)
    return output, setup_config(setting, output, target, train, resume="auto")


def worst_loss(whole: Path, output: Path) -> float:
    """The largest relative difference of a loss after the cut, where every step must be there."""
    expected, found = losses(whole), losses(output)
    assert found.keys() == expected.keys() == set(range(1, CUT + NEXT + 1)), sorted(found)
    return max(abs(found[s] - expected[s]) / abs(expected[s]) for s in expected if s > CUT)


Move = tuple[str, Setup, Setup]  # what trains, from where, to where


def go_on(setting, moves: list[Move]) -> list[float]:
    """Run the sources whole, cut them, go on as the targets: `worst_loss` of every move."""
    sources = sorted({(source.ranks, str(source), train, source) for train, source, _ in moves})
    for ranks, some in itertools.groupby(sources, key=lambda one: one[0]):
        configs = [whole_run(setting, source, train)[1] for *_, train, source in some]
        _expect_nothing(run_ranks(train_all, ranks, configs, timeout=900))
    results: dict[Move, float] = {}
    by_target = sorted(moves, key=lambda move: (move[2].ranks, str(move[2])))
    for ranks, some in itertools.groupby(by_target, key=lambda move: move[2].ranks):
        some = list(some)
        for batch in (some[i : i + 40] for i in range(0, len(some), 40)):
            runs = [cut_run(setting, source, target, train) for train, source, target in batch]
            _expect_nothing(run_ranks(train_all, ranks, [c for _, c in runs], timeout=900))
            for move, (output, _) in zip(batch, runs, strict=True):
                train, source, _ = move
                results[move] = worst_loss(whole_run(setting, source, train)[0], output)
                print(*move, results[move], flush=True)
                shutil.rmtree(output)
    return [results[move] for move in moves]


def _expect_nothing(refusals: list) -> None:
    assert not any(refusals), refusals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=repository() / "results/resume.json")
    out = parser.parse_args().out
    began, rows = time.time(), []
    pairs = list(itertools.product(all_setups(), repeat=2))
    with tempfile.TemporaryDirectory() as folder:
        setting = write_setting(Path(folder))
        for train in tqdm(("routers", "all")):
            found = go_on(setting, [(train, *pair) for pair in pairs])
            for (source, target), worst in zip(pairs, found, strict=True):
                rows.append(
                    {"train": train, "from": asdict(source), "to": asdict(target), "worst": worst}
                )
    failed = [row for row in rows if row["worst"] > BOUND]
    report = provenance() | {
        "command": "make resume",
        "seconds": round(time.time() - began, 1),
        "steps before and after": [CUT, NEXT],
        "bound": BOUND,
        "pairs": rows,
    }
    out.write_text(json.dumps(report).replace('{"train"', '\n {"train"') + "\n", encoding="utf-8")
    print(f"{len(rows) - len(failed)} of {len(rows)} pairs go on as if never cut")
    for row in failed:
        print("DIFFERS", row)


if __name__ == "__main__":
    main()
