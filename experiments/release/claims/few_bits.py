"""What frozen weights in few bits cost: memory, time, accuracy."""

from __future__ import annotations

from collections.abc import Callable

from experiments.release.claim import ByHand, Claim
from experiments.release.claims.memory import ESTIMATES, peak
from experiments.release.results import Results, Row

PAGE = "docs/few_bits.md"
FEW_BITS = "few_bits.json"
LAYERS = "bench_quantised.json"
QWEN, MOLMOE = "qwen3_vl_moe", "molmoe"
FILES = {QWEN: "full_size_qwen3_vl_nf4.json", MOLMOE: "full_size_molmoe_nf4.json"}


def _layer(results: Results, experts: str) -> Row:
    return results.row(LAYERS, layer=experts, mean_k=8.0, mode="forward")


def _bytes_a_weight(experts: str) -> Claim:
    def words(results: Results) -> str:
        in_bfloat16 = _layer(results, "as computed")["bytes"]
        return f"| `{experts}` | {2 * _layer(results, experts)['bytes'] / in_bfloat16:.2f} |"

    return Claim(PAGE, words)


def _layer_times(results: Results) -> str:
    of = {name: f"{_layer(results, name)['over_plain']:.2f}" for name in ("int8", "nf4", "float8")}
    return (
        f"takes {of['int8']} (`int8`), {of['nf4']} (`nf4`) and {of['float8']} (`float8`) of its "
        f"time in bfloat16 at {_layer(results, 'nf4')['tokens']:,} tokens on one core"
    )


def _model(results: Results, backbone: str) -> Row:
    found: Row = results.json(FILES[backbone])["backbones"][backbone]
    return found


def _full_size(backbone: str, title: str) -> Claim:
    def words(results: Results) -> str:
        model = _model(results, backbone)
        step = model["last_step"]
        tokens = step["throughput/tokens_per_second"] * step["throughput/seconds"]
        sizes = (model["estimated_bytes_per_rank"], peak(model))
        return (
            f"| {title}, from its `nf4` folder | `nf4`, `int8` "
            f"| {' / '.join(f'{size / 2**30:.1f}' for size in sizes)} "
            f"| {model['phases'][0]['seconds']:.0f} s "
            f"| {step['throughput/seconds']:.0f} s, {tokens:.0f} tokens, "
            "with activation checkpointing |"
        )

    return Claim(PAGE, words)


def _folder(results: Results) -> str:
    return f"made a folder of {_model(results, QWEN)['checkpoint_bytes'] / 1e9:.1f} GB of one of"


def _folder_of_molmoe(results: Results) -> str:
    model = _model(results, MOLMOE)
    size, seconds = model["checkpoint_bytes"] / 1e9, model["seconds_to_quantise"]
    return f"(MolmoE: {size:.1f} GB in {seconds:.0f} s)"


def _estimated(results: Results, size: str) -> Row:
    return results.row(ESTIMATES, recipe=f"qwen3_vl_gemoe_1_gpu_{size}")


def _one_gpu(results: Results) -> str:
    smaller, larger = (f"{_estimated(results, size)['gib']:.1f}" for size in ("24gb", "48gb"))
    return f"gives {smaller} GiB for the recipe of 24 GB, and {larger} GiB for that of 48"


def _beside(results: Results) -> str:
    beside = _estimated(results, "24gb")["beside_gib"]
    return f"{beside:.1f} GiB beside it for CUDA's context"


def _precision(experts: str, dense: str) -> Claim:
    """A row of the demo's table."""

    def name(dtype: str) -> str:
        return "float32" if dtype == "whole" else f"`{dtype}`"

    def words(results: Results) -> str:
        row = results.json(FEW_BITS)["precisions"][f"experts {experts}, the rest {dense}"]
        less, high, low = (-100 * more for more in row["accuracy_more"])
        changes = [f"{100 * row[key]:.1f} %" for key in ("answers_changed", "k_changed")]
        change = [f"{less:.2f} [{low:.2f}, {high:.2f}]", *changes]
        if (experts, dense) == ("whole", "whole"):
            change = ["", "", ""]
        cells = [f"{100 * row['accuracy']:.2f} %", *change, f"{row['mean_k']:.2f}"]
        return f"| {name(experts)} | {name(dense)} | {' | '.join(cells)} |"

    return Claim(PAGE, words)


def _of_all(words: Callable[[list[Row]], str]) -> Claim:
    return Claim(PAGE, lambda r: words(list(r.json(FEW_BITS)["precisions"].values())))


def _by_more(rows: list[Row]) -> str:
    share = max(row["k_changed_by_more_than_1"] for row in rows)
    return f"in at most 1 of {1 / share:,.0f} cases by more"


def _of_olmoe(experts: str, cells: str) -> Claim:
    command = (
        "python launch/train.py experiments/recipes/full_size.yaml parallel.ep_size=1 "
        f"model.experts_dtype={experts}, on the folder of python -m experiments.full_size --keep"
    )
    by_hand = ByHand(command, "33d1285", "2 CPU cores", "2026-11-29")
    return Claim(PAGE, f"| OLMoE-1B-7B, from bfloat16 | `{experts}`, `null` | {cells} | |", by_hand)


CLAIMS = [
    *(_bytes_a_weight(experts) for experts in ("int8", "float8", "nf4")),
    _full_size(QWEN, "Qwen3-VL-30B-A3B"),
    _full_size(MOLMOE, "MolmoE-1B"),
    _of_olmoe("nf4", "5.35 / 5.20 | 80 s"),
    _of_olmoe("int8", "8.19 / 7.91 | 25 s"),
    Claim(PAGE, _folder),
    Claim(
        PAGE,
        "of one of 32.3 GB in float8 in 386 s beside other work",
        ByHand(  # the file is of a later run on the folder that was kept
            command="python -m experiments.full_size --backbones qwen3_vl_moe --quantise nf4",
            commit="a1763f0",
            machine="2 x Intel(R) Xeon(R) Processor",
            date="2026-11-29",
        ),
    ),
    Claim(PAGE, _folder_of_molmoe),
    Claim(PAGE, _one_gpu),
    Claim(PAGE, _beside),
    Claim(PAGE, _layer_times),
    Claim(
        PAGE,
        "1.7, 2.0 and 2.5 forward in two rounds on a noisy Xeon",
        ByHand(
            command="python -m benchmarks --suites quantised --rounds 2",
            commit="74030b6",
            machine="2 x Intel(R) Xeon(R) Processor, with AMX",
            date="2026-11-29",
        ),
    ),
    _precision("whole", "whole"),
    _precision("int8", "whole"),
    _precision("whole", "int8"),
    _precision("float8", "whole"),
    _precision("nf4", "whole"),
    _precision("nf4", "int8"),
    _of_all(lambda rows: f"{rows[0]['questions']:,} questions of the validation split"),
    _of_all(lambda rows: f"k of {rows[0]['tokens']:,} tokens in every layer"),
    _of_all(_by_more),
]

NOT_MEASURED = {
    PAGE: [
        "on one GPU of 24 GB",
        "the same on one of 48 GB",
        "transformers 5.17",
        "2 CPU cores with 23 GiB",  # of the machine
        # two bytes for each parameter: tests/models/qwen3_vl/test_backbone.py counts them
        "In bfloat16 the weights of Qwen3-VL alone are 58 GiB",
        "writes and removes 51 GB",  # the two folders
    ]
}
