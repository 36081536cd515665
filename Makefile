# make repro: environment and the whole pipeline. make test: environment, lint, types and tests. make check: the committed results.
# make benchmarks: speed.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SHELL = bash
.SHELLFLAGS = -euo pipefail -c
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: repro test lint check benchmarks

repro: $(VENV)/installed
	dvc repro

test: lint
	pytest --cov=gbc --cov-report=term --cov-fail-under=90

lint: $(VENV)/installed
	ruff check .
	ruff format --check .
	pyright

# Params, code, dvc.lock and reports/ are in step, and the committed evaluations redraw the committed report, byte for byte.
check: $(VENV)/installed
	dvc pull --quiet --allow-missing --remote evidence
	plan=$$(dvc repro --dry --allow-missing); echo "$$plan"; ! grep "^Running stage" <<<"$$plan"
	python -m stages.report
	git diff --exit-code --stat reports

# Speed against the published form of the step and other libraries, for the report's table; needs `dvc pull` or `make repro`, about 40 minutes.
benchmarks: $(VENV)/installed
	for name in kkt_step time_to_residual pretrain ssim generator scaling; do \
		result=$$(python -m tests.benchmarks.$$name --json); \
		echo "$$result" > data/benchmarks/$$name.json; \
	done

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
