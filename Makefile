# Each target does its own set-up: the first one makes .venv, the later ones reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo asr-demo asr-demo-commands asr-adaptation test soak lint bench bench-report compile-report gpu-check gpu-check-all clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(INSTALLED): setup.py constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lact_kernels needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): torch, triton, torchaudio and small packages, about 5 GB"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[test]'
	@touch $@

demo: $(INSTALLED)  ## both operations on a spoken recording, against the reference, with a plot
	$(BIN)/python -m examples.demo

asr-demo: $(INSTALLED)  ## a speech recogniser from nothing: corpus, training, evaluation, streaming, a picture
	$(BIN)/python -m examples.asr_demo $(ARGS)

asr-demo-commands: $(INSTALLED)  ## the same for a grammar of 70 words, with a search for words; needs espeak-ng
	$(BIN)/python -m examples.asr_demo --task commands $(ARGS)

asr-adaptation: $(INSTALLED)  ## does test-time training help a recogniser? Nine trainings; needs espeak-ng
	$(BIN)/python -m benchmarks.asr_adaptation $(ARGS)

test: $(INSTALLED)  ## all tests that need no GPU: emulator, interpreter and compiler gate included
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/emulated -n 2 --dist loadgroup
	$(BIN)/python -m pytest tests --ignore tests/emulated -m 'not gpu' -n 2 --dist loadgroup

soak: $(INSTALLED)  ## random small cases of everything against the reference, for a minute; ARGS='--minutes 10'
	$(BIN)/python -m tests.soak $(ARGS)

lint: $(INSTALLED)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)  ## regression timings, saved: compare commits with '.venv/bin/pytest-benchmark compare'
	$(BIN)/python -m pytest benchmarks/bench_*.py --benchmark-autosave

bench-report: $(INSTALLED)  ## throughput against window and chunk size, with the peers; table, JSON lines, plot
	$(BIN)/python -m benchmarks.run $(ARGS)

compile-report: $(INSTALLED)  ## registers, spills, shared memory, warnings and overlap of every kernel; no GPU
	$(BIN)/python -m benchmarks.compile_report $(ARGS)

# These run with the Python they find, so that they work on a GPU machine that has its own PyTorch and no network.
GPU_CHECK := PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check

gpu-check:  ## on a GPU, in 4 minutes: every kernel in 16 bits, five timings; results into $GPU_CHECK_OUT
	$(GPU_CHECK)

gpu-check-all:  ## on a GPU, in 10 minutes: every GPU test, then all GPU benchmarks
	$(GPU_CHECK) --all

clean:  ## remove what the targets made
	rm -rf $(VENV) build dist *.egg-info .benchmarks benchmark-results demo-results asr-demo-results asr-adaptation gpu-check-results .compile-report
