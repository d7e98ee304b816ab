# Every target sets up .venv by itself, once; afterwards make sees that nothing changed and goes straight on.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test lint clean
help:  ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

.venv/.ready: pyproject.toml constraints.txt
	@echo "Setting up .venv (once; a few minutes where torch has to be downloaded)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "uvit needs Python 3.11 or newer: make PYTHON=python3.11")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/.ready  ## Train on built-in images of shapes, and generate some (2 to 4 minutes on two CPU cores)
	@$(BIN)/uvit demo

test: lint  ## Everything that CI runs: lint, types, tests
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/.ready  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:  ## Remove .venv and caches (never your runs)
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
