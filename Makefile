# make repro: environment and the whole pipeline. make test: environment, lint, types and tests. make lint: the checks alone.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: repro test lint

repro: $(VENV)/installed
	dvc repro

test: lint
	pytest --cov=gbc --cov-report=term --cov-fail-under=90

lint: $(VENV)/installed
	ruff check .
	ruff format --check .
	pyright

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
