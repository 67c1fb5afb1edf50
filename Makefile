# hf_mamba: every target sets up what it needs; only Python >= 3.10 and make have to be there.
#
#   make demo                        set up .venv, then generate text with the packaged checkpoints
#   make test                        set up .venv, then run the test-suite
#   make demo TORCH=torch==2.13.0    with another torch requirement
#
# Settings (make TARGET NAME=value): PYTHON, TORCH, VENV, JOBS, ARGS. pip's own settings (PIP_INDEX_URL, ...) hold too.

TORCH ?= torch
PYTHON ?=
VENV ?= .venv
JOBS ?= 2
ARGS ?=
PROMPT ?= It is a truth universally acknowledged

BIN := $(VENV)/bin
SETUP := sh scripts/setup_venv.sh
# one thread a process: parallel test processes would otherwise fight over the cores
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
ifneq ($(JOBS),1)
PYTEST += -n $(JOBS) --dist worksteal
endif

export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu test-oldest lint format typecheck wheel-test bench docs clean FORCE

help: ## list the targets
	@echo "usage: make TARGET [NAME=value ...]"
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F '|' '{printf "%-14s %s\n", $$1, $$2}'
	@echo
	@echo "  TORCH=$(TORCH)  (the torch requirement to install, such as torch==2.13.0)"
	@echo "  PYTHON=         (the interpreter; default: the first Python >= 3.10 on the path)"
	@echo "  VENV=$(VENV)  JOBS=$(JOBS) (test processes)  ARGS= (more arguments for the command)"

# holds the settings of the last set-up and is rewritten only when they change
$(VENV)/.settings: FORCE
	@mkdir -p $(VENV)
	@printf '%s\n' "$(TORCH) $(PYTHON)" | cmp -s - $@ || printf '%s\n' "$(TORCH) $(PYTHON)" > $@

$(VENV)/.ready: pyproject.toml scripts/setup_venv.sh $(VENV)/.settings
	@$(SETUP) "$(VENV)" "$(TORCH)" --editable ".[dev]"
	@touch $@

setup: $(VENV)/.ready ## create .venv with torch, hf_mamba and the development tools

demo: setup ## text of the packaged Mamba, Mamba-2 and MoE-Mamba side by side, on the CPU
	@$(BIN)/python examples/demo.py "$(PROMPT)" $(ARGS)

test: setup ## run the test-suite (ARGS="tests/test_cli.py -k env" chooses)
	$(PYTEST) $(ARGS)

test-gpu: setup ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

OLDEST_TORCH = $(if $(filter command environment,$(firstword $(origin TORCH))),$(TORCH),)

test-oldest: setup ## run the test-suite with the oldest allowed transformers and other dependencies
	@$(BIN)/python scripts/oldest_requirements.py $(if $(OLDEST_TORCH),--torch "$(OLDEST_TORCH)") > $(VENV)/oldest.txt
	@$(SETUP) .venv-oldest "$$(sed -n '/^torch[=<>! ]/p' $(VENV)/oldest.txt)" \
		--constraint $(VENV)/oldest.txt --editable ".[test]"
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist worksteal) $(ARGS)

lint: setup ## check formatting and lint rules with ruff
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: setup ## format and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

typecheck: setup ## check the types with mypy
	$(BIN)/mypy

wheel-test: setup ## build sdist and wheel, install the wheel in a clean environment, test it from another folder
	sh scripts/wheel_test.sh "$(BIN)/python" "$(TORCH)" $(ARGS)

bench: setup ## time training and generation on the CPU beside transformers' own classes
	@$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python -m benchmarks cpu-training $(ARGS)
	$(BIN)/python -m benchmarks cpu-generate $(ARGS)

$(VENV)/.docs: $(VENV)/.ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	@touch $@

# -E: pages that are read from a cache would not warn again
docs: $(VENV)/.docs ## build the documentation into build/docs; a warning is an error
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html -d build/doctrees docs build/docs $(ARGS)
	@echo "open build/docs/index.html"

clean: ## remove the environments, builds and caches
	rm -rf .venv .venv-oldest build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

FORCE:
