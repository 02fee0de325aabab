# `make` alone lists what there is. Everything runs in a virtual environment of its own, .venv.

PYTHON      ?= python3
TORCH       ?= torch==2.13.0
TORCH_INDEX ?=

# Peers that the benchmark compares with, beside those that the extras bring.
PEERS := torch_checkpointing==0.1.1 torchsnapshot==0.1.0

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --quiet --disable-pip-version-check
DONE := $(VENV)/.done

PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal
N      ?= 20

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-soak test-all test-repeat test-matrix lint format bench bench-quick bench-sharded bench-targets bench-gpu bench-lightning clean

help:
	@echo 'make demo             train a small GPT, kill it, resume it, and show what its saves cost (2 minutes)'
	@echo 'make test             run the tests, without those marked slow (minutes)'
	@echo 'make test-slow        run those marked slow: benchmark scripts, every point of a sweep, ...'
	@echo 'make test-soak        run those marked soak: hundreds of killed ranks, all pairs of numbers of ranks, ...'
	@echo 'make test-all         run all of them'
	@echo 'make test-repeat      run the tests N=20 times beside a busy process, until one fails'
	@echo 'make test-matrix      run all tests on each Python and torch that is declared (see .ci/matrix)'
	@echo 'make lint             run ruff, mypy and import-linter'
	@echo 'make format           let ruff format and fix what it can'
	@echo 'make bench            compare with the peers: same state, same disk, one run (an hour)'
	@echo 'make bench-sharded    the part of it with four ranks: FSDP2 and DDP beside DCP (15 minutes)'
	@echo 'make bench-quick      the same with a small state: does the measuring work? (a minute)'
	@echo 'make bench-targets    measure the figures that asyncckpt is to reach, and say which are met'
	@echo 'make bench-gpu        run the tests that need a GPU, and measure what is to be reached there (5 minutes)'
	@echo 'make bench-lightning  measure what a save costs a Lightning Trainer, and see what a slow disk does to it'
	@echo 'make clean            remove the virtual environment and whatever was made'
	@echo
	@echo 'Each one makes $(VENV) and installs what it needs when that has changed. Variables:'
	@echo '  PYTHON       the Python, 3.10 or newer, to make it with    now: $(PYTHON)'
	@echo '  TORCH        the torch to install first                    now: $(TORCH)'
	@echo '  TORCH_INDEX  where to take torch from                      now: $(or $(TORCH_INDEX),pip'\''s own index)'
	@echo
	@echo 'On Linux the torch of PyPI brings gigabytes of CUDA with it. Without a GPU, rather:'
	@echo '  make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu'
	@echo 'After changing TORCH or TORCH_INDEX: make clean.'

demo: $(DONE)/demo
	$(BIN)/python examples/demo.py

test: $(DONE)/test
	$(PYTEST) -m 'not slow and not soak' $(ARGS)

# By file: what a benchmark script has measured is looked at by all the tests of its file.
test-slow: $(DONE)/test
	$(PYTEST) -m 'slow and not soak' --dist loadfile $(ARGS)

test-soak: $(DONE)/test
	$(PYTEST) -m soak --dist loadfile $(ARGS)

test-all: $(DONE)/test
	$(PYTEST) $(ARGS)

test-repeat: $(DONE)/test
	$(BIN)/python tests/repeat.py $(N) $(PYTEST) -m 'not slow and not soak' $(ARGS)

# ONLY names some of its environments; ARGS go to pytest.
test-matrix:
	.ci/matrix $(ONLY) $(if $(ARGS),-- $(ARGS))

# mypy runs once for each directory of scripts: their modules may have the same names.
lint: $(DONE)/demo $(DONE)/test $(DONE)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy asyncckpt examples
	$(BIN)/mypy benchmarks
	$(BIN)/mypy tests
	$(BIN)/lint-imports

format: $(DONE)/lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DONE)/peers
	$(BIN)/python benchmarks/compare.py --out runs/bench $(ARGS)
	$(if $(ARGS),,$(BIN)/python benchmarks/sharded.py --json runs/bench/sharded.json)

bench-quick: $(DONE)/peers
	$(BIN)/python benchmarks/compare.py --quick --out runs/bench-quick $(ARGS)
	$(if $(ARGS),,$(BIN)/python benchmarks/sharded.py --quick --repeat 1 --json runs/bench-quick/sharded.json)

bench-sharded: $(DONE)/test
	$(BIN)/python benchmarks/sharded.py $(ARGS)

bench-targets: $(DONE)/test
	$(BIN)/python benchmarks/targets.py $(ARGS)

bench-gpu: $(DONE)/bench
	PYTHONPATH=$(CURDIR) $(BIN)/python benchmarks/gpu.py $(ARGS)

bench-lightning: $(DONE)/test
	$(BIN)/python benchmarks/lightning_overhead.py $(ARGS)
	$(BIN)/python benchmarks/lightning_scenarios.py $(ARGS)

clean:
	rm -rf $(VENV) runs build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find asyncckpt benchmarks examples tests -name __pycache__ -prune -exec rm -rf {} +

$(DONE)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "asyncckpt needs Python 3.10 or newer; name one: make PYTHON=python3.12 …")'
	@echo 'Making $(VENV), installing $(TORCH) (once; minutes on a slow line)'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@mkdir -p $(DONE) && touch $@

# Those that do not install are shown as failed.
$(DONE)/peers: $(DONE)/bench
	@for peer in $(PEERS); do $(PIP) install $$peer || echo "$$peer does not install here"; done
	@touch $@

# One stamp for each extra: the package in editable mode with that extra, anew when pyproject.toml changes.
$(DONE)/%: pyproject.toml $(DONE)/torch
	@echo 'Installing asyncckpt[$*] into $(VENV)'
	@$(PIP) install --editable '.[$*]'
	@touch $@
