# `make` alone lists the targets. Everything lives in this folder: the environment in .venv, models in models/.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
MODEL ?= smollm2
PORT ?= 8000
BITS ?= 4
METHOD ?= xquant
# More options for examples/demo.py, e.g. make demo DEMO_ARGS=--enforce-eager
DEMO_ARGS ?=
# More options for benchmarks/compare_accuracy.py
ACCURACY_ARGS ?=
# More options for benchmarks/bench_cpu.py, e.g. make bench-cpu BENCH_ARGS="--only hot" (20 minutes)
BENCH_ARGS ?=
# Of `make soak`, shared by the caches, and more options for benchmarks/soak
REQUESTS ?= 200
SOAK_ARGS ?=
# Compute capabilities and options of `make gpu-sweep`, and options of `make triton-matrix`
SWEEP_ARGS ?= 80 86 89 90 100
MATRIX_ARGS ?=
# More options for tools/release.py
RELEASE_ARGS ?=
# More options for pytest, e.g. make test TEST_ARGS="-m 'not e2e'"
TEST_ARGS ?=

VENV := .venv
READY := $(VENV)/.ready
KERNELS := xquant_vllm/attention/cpu/_cpu_kernels.so
SETUP_FILES := pyproject.toml setup.py tools/setup_env.py $(wildcard tools/envsetup/*.py) \
	tools/vllm-metadata/pyproject.toml
# What the tests read; prepared before them, so that no test's time is spent on downloads.
TEST_MODELS := smollm2 smollm2-mha gemma3
DOCKERFILES := docker/Dockerfile docker/Dockerfile.cpu
# In a process of their own: Triton decides when it is imported whether it interprets.
TRITON_TESTS := tests/attention/gpu tests/kivi/gpu tests/plugin/hot/gpu
LINTED := xquant_vllm tests tools examples benchmarks docker setup.py

.PHONY: help venv kernels cuda-check gpu-counts gpu-sweep triton-matrix model demo serve \
	test test-models test-gpu test-docs test-scale test-gpu-worker test-next-vllm test-nightly accuracy pictures bench-cpu \
	families families-write families-all soak sanitize dist release docs reference lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) $(KERNELS) ## make the environment .venv: vLLM for CPU, this package, its kernels and tools

$(READY): $(SETUP_FILES)
	$(PYTHON) tools/setup_env.py

kernels: $(KERNELS) ## compile csrc/cpu, if it changed (XQUANT_BUILD_KERNELS=1: fail if it does not compile)

$(KERNELS): setup.py $(wildcard csrc/cpu/* csrc/cpu/*/*) | $(READY)
	$(VENV)/bin/python setup.py --quiet build_kernels --inplace

# Hours: every format, head size, group and dtype, for every GPU. `SWEEP_ARGS="90 --spread"` takes a tenth, for one.
gpu-sweep: venv ## compile the Triton kernels of all that can be served, for every GPU; fail on what does not fit
	OMP_NUM_THREADS=1 TRITON_CACHE_DIR=build/triton/cache $(VENV)/bin/python -m tests.attention.gpu.sweep $(SWEEP_ARGS)

triton-matrix: venv ## compile and interpret the Triton kernels by Triton 3.7, 3.8 and 3.9 (downloads 0.5 GB into build)
	$(VENV)/bin/python tools/triton_matrix.py $(MATRIX_ARGS)

cuda-check: venv ## compile the GPU kernels of the served default for every GPU, and fail on spilled registers (a minute, no GPU)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.attention.gpu.sweep 80 86 89 90 100 --served

gpu-counts: venv ## count what the GPU kernels execute, from machine code (5 minutes, no GPU); the last line is JSON
	$(VENV)/bin/python -m benchmarks.gpu.counts

model: venv ## prepare the checkpoint MODEL (default smollm2; or smollm2-mha, gemma3, qwen-coder-0.5b ...); the last line is its folder
	@$(VENV)/bin/python tools/prepare_model.py --model $(MODEL)

demo: venv ## serve MODEL with a BITS-bit cache (METHOD xquant or xquant-cl), chat, compare with the 16-bit cache
	$(VENV)/bin/python examples/demo.py --model $(MODEL) --bits '$(BITS)' --method $(METHOD) $(DEMO_ARGS)

serve: venv ## serve MODEL with a BITS-bit cache on PORT until Ctrl-C
	$(VENV)/bin/python examples/demo.py --serve --model $(MODEL) --bits '$(BITS)' --method $(METHOD) --port $(PORT) $(DEMO_ARGS)

test-models: venv ## prepare the checkpoints that the tests read
	$(VENV)/bin/python tools/prepare_model.py $(addprefix --model ,$(TEST_MODELS))

# Two files of tests run side by side on two cores, and all that they start has one thread: with two each, the four would
# wait for each other most of the time. In their own order, which ends with short ones, so that no core idles at the end.
test: test-models ## run the tests
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TEST_ARGS)
	$(MAKE) test-gpu

test-gpu: venv ## run the tests of the Triton kernels, without a GPU in Triton's interpreter
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest $(TRITON_TESTS) -n 2

test-docs: venv ## run the tests of the documentation: its commands, its Python, its paths, and what it says of vLLM
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/docs

test-scale: venv ## run all tests with several ranks: tensor, data and pipeline parallelism, with Ray and without
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/e2e/scale -m "e2e or nightly" $(TEST_ARGS)

test-gpu-worker: venv ## run what a GPU worker runs, on tensors of the CPU: start-up, graphs and their replays, tokens
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/e2e/gpu_worker -m "e2e or nightly" $(TEST_ARGS)

# vLLM finds its own files by PYTHONPATH, before those of the environment.
test-next-vllm: venv ## test with the Python of the next vLLM over the compiled parts of the installed one (47 MB to load)
	$(VENV)/bin/python tools/next_vllm.py
	PYTHONPATH=$(CURDIR)/build/next-vllm$${PYTHONPATH:+:$$PYTHONPATH} OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest \
		-m "e2e or not e2e" tests/docs/test_seams.py tests/docs/test_seam_signatures.py tests/plugin tests/kivi/plugin \
		tests/e2e/gpu_worker $(TEST_ARGS)

accuracy: test-models ## compare the accuracy of all caches per byte (an hour on two cores); writes docs/accuracy.md
	$(VENV)/bin/python benchmarks/compare_accuracy.py --write --models models/smollm2-135m-instruct \
		models/smollm2-135m-instruct-mha models/gemma-3-270m $(ACCURACY_ARGS)

pictures: venv ## make the pictures of README.md and docs/how-it-works.md from result files and page layouts
	$(VENV)/bin/python benchmarks/capacity_plot.py
	$(VENV)/bin/python tools/draw_figures.py

reference: venv ## write docs/command-line.md and docs/settings.md from the parsers and the settings
	$(VENV)/bin/python tools/write_reference.py

docs: venv ## build the documentation as a site into build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

bench-cpu: venv ## measure decode, hot blocks, serving under memory pressure, and kernels, against 16 bit (45 minutes)
	$(VENV)/bin/python tools/prepare_model.py --model smollm2 --model smollm2-mha
	$(VENV)/bin/python benchmarks/bench_cpu.py $(BENCH_ARGS)

families: venv ## check that docs/families.md says what the last run of all tests covered
	$(VENV)/bin/python tools/family_table.py
	$(VENV)/bin/python tools/hub_table.py

families-write: venv ## write the tables of docs/families.md from the last run of all tests, and of all families
	$(VENV)/bin/python tools/family_table.py --write
	$(VENV)/bin/python tools/hub_table.py --write

families-all: venv ## try every family of the model hub in vLLM, and write what became of it into docs/families.md
	rm -rf build/families-found
	OMP_NUM_THREADS=1 XQUANT_FAMILIES_FOUND=build/families-found $(VENV)/bin/python -m pytest -m e2e -n 2 \
		tests/e2e/families/test_support_matrix.py $(TEST_ARGS)
	$(VENV)/bin/python tools/hub_table.py --found build/families-found --write

test-nightly: venv ## run the tests that are left out of `make test` because they take long and many are alike
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m nightly -n 2 --dist loadfile $(TEST_ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -m nightly -n 2 $(TRITON_TESTS) $(TEST_ARGS)

soak: venv ## serve REQUESTS (default 200) mixed requests, with faults, by every cache in turn; the last line is JSON
	$(VENV)/bin/python tools/prepare_model.py --model smollm2
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.soak --requests $(REQUESTS) $(SOAK_ARGS)

sanitize: venv ## test the C++ kernels for CPUs under AddressSanitizer and UndefinedBehaviorSanitizer (3 minutes)
	$(VENV)/bin/python tools/sanitize_kernels.py

dist: venv ## build the source distribution and, from it, the wheel (kernels inside if they compile) into dist/
	$(VENV)/bin/python -m build --no-isolation

release: venv ## build what is published into dist/, a manylinux wheel, and check it; RELEASE_ARGS="--tag vX.Y.Z" also the tag
	$(VENV)/bin/python tools/release.py $(RELEASE_ARGS)

lint: venv ## check style, types, which room imports which, Dockerfiles and shell scripts
	$(VENV)/bin/ruff check $(LINTED)
	$(VENV)/bin/ruff format --check $(LINTED)
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/hadolint $(DOCKERFILES)
	$(VENV)/bin/shellcheck .ci/run docker/*.sh

clean: ## remove build outputs, logs and caches (not .venv, not models)
	rm -rf build dist logs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f $(KERNELS)
	find $(LINTED) -name __pycache__ -type d -prune -exec rm -rf {} +
