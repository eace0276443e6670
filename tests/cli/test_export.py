"""The exported folder: stock transformers loads it, and its own code routes as training did."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from gemoe_ds.checkpoint.manifest import newest
from gemoe_ds.checkpoint.state import load_trained_weights
from gemoe_ds.cli.export import main
from gemoe_ds.config.load import load_config
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.train.assemble import build_model
from tests.helpers import run_here, run_python, run_ranks
from tests.tiny import model_inputs, random_batch
from tests.train.resuming import make_config, train_all, write_setting


def export(*arguments: object) -> subprocess.CompletedProcess:
    return run_here(main, *arguments)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def coarse(setting):
    """The tiny base in bfloat16 and in shards."""
    folder = setting["root"] / "coarse"
    model = LlavaForConditionalGeneration.from_pretrained(setting["hf"], dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.fixture(scope="module")
def runs(setting, coarse):
    """A few steps each on the tiny base, in one process group."""
    root = setting["root"]
    gemoe = {"name": "gemoe", "k_low": 0, "k_high": 6}  # k must differ between tokens
    changes = {
        "gemoe": {"model__router": gemoe, "optim__predictor_lr": 0.1},
        "moepp": {"model__router": {"name": "moepp", "free_rows": "copies"}},
        "on_coarse": {"model__checkpoint": str(coarse)},
        "all": {"model__trainable": "all"},
    }
    configs = [
        make_config(setting, root / name, parallel__ep_size=1, **of) for name, of in changes.items()
    ]
    assert run_ranks(train_all, 1, configs) == [None]
    return {name: root / name for name in changes}


@pytest.fixture(scope="module")
def run(runs):
    return runs["gemoe"]


@pytest.fixture(scope="module")
def exported(setting, run):
    """As the file writes it."""
    out = setting["root"] / "exported"
    done = run_python("launch/export.py", run / "config.yaml", "--trained", run, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def trained_model(run, *overrides):
    config = load_config(run / "config.yaml", list(overrides))
    model = build_model(config, ExpertShard())
    load_trained_weights(model, newest(run))
    return model.eval()


def logits_of(model, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        hidden = model.hidden(model_inputs(batch))
        return model.backbone.head(model.hf)(hidden)[batch["is_valid_BS"]]


def stock_inputs(batch: dict) -> dict:
    inputs = {
        "input_ids": batch["input_ids_BS"],
        "attention_mask": batch["is_valid_BS"].long(),
    }
    if batch["is_vision_BS"].any():
        inputs["pixel_values"] = batch["images"]["pixels"]
    return inputs


BATCHES = [random_batch(1, batch=3), random_batch(2, batch=2, images=False)]


def test_stock_transformers_loads_it_and_agrees_at_the_backbones_k(run, exported):
    stock, report = LlavaForConditionalGeneration.from_pretrained(
        exported, output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    auto = AutoModelForImageTextToText.from_pretrained(exported)
    assert type(auto) is LlavaForConditionalGeneration
    ours = trained_model(run)
    gates = {n: p for n, p in ours.named_parameters() if n.endswith("router.gate.weight")}
    fixed = trained_model_with_fixed_k(run, gates)
    for batch in BATCHES:
        with torch.no_grad():
            have = stock.eval()(**stock_inputs(batch)).logits[batch["is_valid_BS"]]
        torch.testing.assert_close(have, logits_of(fixed, batch), rtol=1e-5, atol=1e-6)


def trained_model_with_fixed_k(run, gates):
    config = load_config(run / "config.yaml", ["model.router={name: top_k}"])
    model = build_model(config, ExpertShard()).eval()
    with torch.no_grad():
        for name, gate in gates.items():
            model.get_parameter(name).copy_(gate)
    return model


ALONE = """
import sys
class Without:  # as if these were not installed
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ("deepspeed", "gemoe_ds"):
            return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
import torch
from transformers import AutoModelForImageTextToText
folder, batches, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
results = []
with torch.no_grad():
    for inputs in torch.load(batches):
        logits = model(**inputs).logits
        results.append((logits, torch.stack(model.k_per_layer)))
    inputs = torch.load(batches)[1]
    row = {name: value[:1, :6] for name, value in inputs.items()}
    written = model.generate(**row, max_new_tokens=8, do_sample=False)
    ids = row["input_ids"]
    for _ in range(8):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    half = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.bfloat16
    ).eval()
    coarse = half(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()})
    dtypes = {str(p.dtype) for n, p in half.named_parameters() if ".gemoe." in n}
torch.save((results, written, ids, coarse.logits, dtypes), out)
"""


@pytest.fixture(scope="module")
def alone(setting, exported):
    """The exported folder in a process without gemoe_ds and DeepSpeed."""
    root = setting["root"]
    torch.save([stock_inputs(batch) for batch in BATCHES], root / "batches.pt")
    (root / "alone.py").write_text(ALONE)
    done = subprocess.run(
        [sys.executable, "-I", root / "alone.py", exported, root / "batches.pt", root / "out.pt"],
        capture_output=True,
        text=True,
        cwd=root,
        env={"HF_HOME": str(root / "hf_home"), "HF_HUB_OFFLINE": "1", "PATH": ""},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(root / "out.pt", weights_only=False)


def test_its_own_code_gives_the_logits_and_the_k_of_training(run, alone):
    ours = trained_model(run)
    ours.ctx.trace = True
    for batch, (logits, k_LBS) in zip(BATCHES, alone[0], strict=True):
        expected = logits_of(ours, batch)
        torch.testing.assert_close(logits[batch["is_valid_BS"]], expected, rtol=1e-5, atol=1e-6)
        k_LT = torch.stack([record.k_T for record in ours.ctx.layers])
        assert torch.equal(k_LBS.flatten(1), k_LT)
        assert k_LT.unique().numel() > 2, "tokens differ, else nothing is shown"


def test_free_experts_and_what_a_layer_hands_to_the_next_go_along(runs, tmp_path):
    """MoE++: copies and constants beside the experts, logits of the layer before."""
    run = runs["moepp"]
    done = export(run / "config.yaml", "--trained", run, "--out", tmp_path / "hf")
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", trust_remote_code=True
    ).eval()
    ours = trained_model(run)
    for batch in BATCHES:
        with torch.no_grad():
            logits = theirs(**stock_inputs(batch)).logits[batch["is_valid_BS"]]
        torch.testing.assert_close(logits, logits_of(ours, batch), rtol=1e-5, atol=1e-6)
        k = torch.stack([k_BS[batch["is_valid_BS"]] for k_BS in theirs.k_per_layer])
        assert k.min() < 4, "some tokens chose free ones"


def test_the_predictor_decides_k_in_the_exported_model(exported):
    """Other predictors, other logits: its own code does use them."""
    model = AutoModelForImageTextToText.from_pretrained(exported, trust_remote_code=True).eval()
    inputs = stock_inputs(BATCHES[0])
    with torch.no_grad():
        before, k = model(**inputs).logits, torch.stack(model.k_per_layer)
        for name, parameter in model.named_parameters():
            if name.endswith("eap.weight"):
                parameter.neg_()
        after = model(**inputs).logits
    assert not torch.equal(torch.stack(model.k_per_layer), k) and not torch.equal(before, after)


def test_generation_with_a_cache_is_greedy_step_by_step(alone):
    _, written, ids, coarse, dtypes = alone
    length = written.shape[1]
    assert length > 6 and torch.equal(written, ids[:, :length])
    assert coarse.dtype == torch.bfloat16 and coarse.isfinite().all()
    assert dtypes == {"torch.float32"}, "routing keeps its precision"


def stored(folder) -> dict[str, torch.Tensor]:
    return {k: t for path in folder.glob("model*.safetensors") for k, t in load_file(path).items()}


def test_what_does_not_train_is_bit_exact_and_a_round_trip_changes_nothing(
    setting, run, exported, tmp_path
):
    base, ours = stored(setting["hf"]), stored(exported)
    assert base.keys() == ours.keys()
    changed = {k for k in base if not torch.equal(base[k], ours[k])}
    assert changed == {k for k in base if k.endswith("mlp.gate.weight")}
    assert all(base[k].dtype == ours[k].dtype for k in base)
    again = make_config(setting, tmp_path / "run", model__checkpoint=str(exported))
    again = again.model_copy(
        update={
            "optim": again.optim.model_copy(update={"lr": 1e-30}),
            "parallel": again.parallel.model_copy(update={"ep_size": 1}),
            "train": again.train.model_copy(update={"steps": 2}),
        }
    )
    assert run_ranks(unmoved, 1, again) == [None]
    done = export(
        tmp_path / "run/config.yaml", "--trained", tmp_path / "run", "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    second = stored(tmp_path / "out")
    assert all(torch.equal(ours[k], second[k]) for k in ours)


def unmoved(rank, config):
    """Two steps at a rate that rounds to nothing."""
    from gemoe_ds.engine.build import MovedCheck

    MovedCheck.check = lambda self: None
    return train_all(rank, [config])


def test_a_base_in_bfloat16_and_in_shards_keeps_dtype_and_bits(runs, coarse, tmp_path):
    run = runs["on_coarse"]
    done = export(run / "config.yaml", "--trained", run, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = stored(coarse), stored(tmp_path / "out")
    frozen = [k for k in before if not k.endswith("mlp.gate.weight")]
    assert before.keys() == after.keys()
    assert all(
        after[k].dtype == torch.bfloat16 and torch.equal(before[k], after[k]) for k in frozen
    )


def test_a_run_that_trained_everything_is_exported_too(runs, tmp_path):
    output = runs["all"]
    done = export(output / "config.yaml", "--trained", output, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = stored(tmp_path / "out"), stored(output / "hf")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("mistake", ["exists", "no checkpoint", "other base"])
def test_mistakes_cost_one_line_and_leave_nothing(setting, run, exported, tmp_path, mistake):
    out, trained, extra, words = tmp_path / "out", run, [], ""
    if mistake == "exists":
        out, words = exported, "exists already; choose a new folder"
    elif mistake == "no checkpoint":
        trained, words = tmp_path, "no checkpoint there"
    else:
        other = tmp_path / "other"
        other.mkdir()
        for path in setting["hf"].iterdir():
            (other / path.name).write_bytes(path.read_bytes())
        with safe_open(other / "model.safetensors", "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        tensors[min(tensors)] += 1
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        extra, words = [f"model.checkpoint={other}"], "was trained on a base with checksum"
    done = export(run / "config.yaml", *extra, "--trained", trained, "--out", out)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line
    assert mistake == "exists" or not out.exists()
    assert not list(tmp_path.glob(".writing*"))


def test_the_folder_says_what_it_is_made_from(run, exported):
    made = json.loads((exported / "provenance.json").read_text())
    assert made["step"] == 6 and made["checkpoint"].startswith(str(run))
    assert len(made["base sha256"]) == 64 and made["command"].startswith("gemoe export ")
    assert "gemoe" in (exported / "README.md").read_text()
    assert (exported / "tokenizer.json").exists()


def test_no_code_of_its_own_goes_with_a_quantised_base(setting, run, tmp_path):
    base = shutil.copytree(setting["hf"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    words = ["--trained", run, "--out", tmp_path / "out", f"model.checkpoint={base}"]
    done = export(run / "config.yaml", *words)
    assert done.returncode == 2 and "is quantised, and the code that goes with" in done.stderr
    assert "give --code base" in done.stderr and not (tmp_path / "out").exists()


def test_a_run_on_few_bits_goes_onto_the_base_before_or_stays_beside_them(setting, run):
    """The gates of a run on a float8 base: on the whole base with code of their own, or on it."""
    root = setting["root"]
    done = export(run / "config.yaml", "--quantise", "float8", "--out", root / "float8")
    assert done.returncode == 0, done.stderr[-3000:]
    config = make_config(
        setting,
        root / "run_float8",
        model__checkpoint=str(root / "float8"),
        model__experts_dtype="float8",
        parallel__ep_size=1,
        train__steps=2,
    )
    assert run_ranks(train_all, 1, [config]) == [None]
    trained = ("--trained", root / "run_float8")
    recipe = root / "run_float8/config.yaml"
    refused = export(recipe, *trained, "--out", root / "x")
    assert "is quantised, and the code" in refused.stderr and "--base" in refused.stderr
    beside = export(recipe, *trained, "--code", "base", "--out", root / "beside")
    assert beside.returncode == 0, beside.stderr[-3000:]
    onto = export(recipe, *trained, "--base", setting["hf"], "--out", root / "onto")
    assert onto.returncode == 0, onto.stderr[-3000:]
    base, whole = (load_all(folder) for folder in (setting["hf"], root / "onto"))
    changed = {key for key, tensor in base.items() if not torch.equal(tensor, whole[key])}
    assert changed and all("gate.weight" in key for key in changed)
    there, after = load_all(root / "float8"), load_all(root / "beside")
    assert {k for k, t in there.items() if not torch.equal(t, after[k])} == changed
    for key in changed:
        assert torch.equal(whole[key], after[key])
    provenance = json.loads((root / "onto/provenance.json").read_text())
    assert provenance["base"] == str(setting["hf"])
    assert provenance["trained on"] == str(root / "float8")
    few = export(recipe, *trained, "--code", "base", "--quantise", "nf4", "--out", root / "few")
    assert few.returncode == 0, few.stderr[-3000:]
    assert "gemoe_ds alone reads" in (root / "few/README.md").read_text()


def test_what_is_for_a_run_alone_is_refused_without_one(setting, run):
    for option in (("--code", "own"), ("--base", setting["hf"])):
        done = export(run / "config.yaml", "--quantise", "nf4", *option, "--out", "x")
        assert done.returncode == 2 and f"{option[0]} is for what has trained" in done.stderr


def load_all(folder) -> dict[str, torch.Tensor]:
    files = (path for path in folder.glob("*.safetensors") if path.name != "routers.safetensors")
    tensors = {key: one for path in files for key, one in load_file(path).items()}
    return {
        k: t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for k, t in tensors.items()
    }
