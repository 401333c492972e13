# Both `quickstart` and `test` make .venv/ and reuse it while its inputs stay the same.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export PYTHONWARNINGS ?= ignore

.PHONY: environment quickstart test lint doctor

environment: $(STAMP)

# torch first: with one installed, nothing else pulls another build of it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: $(STAMP)
	$(BIN)/python tools/quickstart.py

test: $(STAMP)
	$(BIN)/python -m pytest tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# ARGS='--config RECIPE --trial', ARGS='--nodes HOST HOST': docs/multi_node.md
doctor: $(STAMP)
	$(BIN)/python -m megatron_ttt.doctor $(ARGS)
