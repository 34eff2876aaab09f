# Eight verbs; `make` alone lists them. Everything runs in one virtual environment that the first verb makes.
#   PYTHON=python3.12       the interpreter to build the environment from (default: python3, if it is 3.10 to 3.13)
#   TORCH_INDEX=URL         the package index to take torch from, e.g. one that carries CPU-only builds
#   VENV=DIR                where the environment goes
#   ARGS="..."              handed on to `worldloom quickstart` or pytest

SHELL := /bin/sh
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# Two test processes on two cores: one torch thread each.
test test-all: export OMP_NUM_THREADS = 1
export PYTHON TORCH_INDEX

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-all lint docs bench clean .venv

help: ## list the verbs
	@awk 'BEGIN { FS = ":.*## " } /^[a-z][a-z-]*:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

quickstart: $(VENV)/.installed-quickstart ## the whole loop on this machine, ending with a report in runs/quickstart
	$(BIN)/worldloom quickstart --out runs/quickstart $(ARGS)

test: $(VENV)/.installed-dev ## the fast tests (about what CI runs)
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-all: $(VENV)/.installed-dev ## every test, slow ones too; those that need a GPU skip themselves without one
	$(BIN)/python -m pytest -n 2 -m "" $(ARGS)

lint: $(VENV)/.installed-dev ## ruff, pyright, and the rule on who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev ## the documentation, into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(VENV)/.installed-dev ## every benchmark; each prints a ratio
	@set -e; for file in benchmarks/*.py; do [ -e "$$file" ] || continue; echo "== $$file"; $(BIN)/python "$$file"; done

clean: ## remove what builds and tests leave behind; never runs/, .worldloom or the environment
	rm -rf docs/_build dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find platform tokenizers curation model_zoo finetune tests docs benchmarks examples \
		-name __pycache__ -type d -prune -exec rm -rf {} +

.venv: $(VENV)/.installed-dev

# The stamps: made once, made again when pyproject.toml changes. An environment for developers serves quickstart too.
$(VENV)/.installed-dev: pyproject.toml
	bash .ci/venv $(VENV) dev
	@touch $(VENV)/.installed-quickstart $@

$(VENV)/.installed-quickstart: pyproject.toml
	bash .ci/venv $(VENV) quickstart
	@touch $@
