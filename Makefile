# Both `quickstart` and `test` make .venv/ and reuse it while its inputs stay the same.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export PYTHONWARNINGS ?= ignore

.PHONY: environment quickstart test test-all test-more lint doctor

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

# The first tier; everything; what everything adds to the first tier.
test: TIER = --tier first
test-more: TIER = --tier second
test test-all test-more: $(STAMP)
	$(BIN)/python -m pytest tests $(TIER) --numprocesses 2 --dist worksteal --durations 10 \
		--disable-warnings

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# ARGS='--config RECIPE --trial', ARGS='--nodes HOST HOST': docs/multi_node.md
doctor: $(STAMP)
	$(BIN)/python -m megatron_ttt.doctor $(ARGS)
