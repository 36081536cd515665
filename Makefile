# make repro: environment and the whole pipeline. make test: environment, lint, types and tests. make check: the committed results.
# make benchmarks: speed. make ablation: what every term is worth. make pixels: what g is worth. make scaling: how size matters. make seeds: other seeds. make evidence: keep in git what the report reads.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SHELL = bash
.SHELLFLAGS = -euo pipefail -c
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: repro test lint check evidence benchmarks ablation pixels scaling seeds test-remotes

repro: $(VENV)/installed
	dvc repro

test: lint
	OMP_NUM_THREADS=1 pytest --numprocesses=logical --dist=loadfile --cov=gbc --cov-report=term --cov-fail-under=90

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
	! git status --porcelain reports | grep .

# After a run: what the report is drawn from goes to data/evidence, to be committed with dvc.lock and reports/.
evidence: $(VENV)/installed
	rm -rf data/evidence/files
	sed -nE 's#^    - path: (data/(oracles|lambda|histories|evaluations)/.*)#\1#p' dvc.lock | sort -u | xargs dvc push --quiet --remote evidence

# Speed against the published form of the step and other libraries, for the report's table; needs `dvc pull` or `make repro`, about 40 minutes.
benchmarks: $(VENV)/installed
	for name in kkt_step time_to_residual pretrain ssim generator scaling; do \
		result=$$(python -m tests.benchmarks.$$name --json); \
		echo "$$result" > data/benchmarks/$$name.json; \
	done

# Terms of the loss off in turn, three seeds, for the report's table: an hour and a half. Rows that are there are not made again: delete the files first.
ablation: $(VENV)/installed
	python -m stages.ablate mnist_10 'pretrain.mnist_10.hidden=[1000,2000]' train_single.mnist_10.length=2.0 steps=500 evaluate.samples=1000
	python -m stages.ablate mnist_plain train_single.mnist_plain.length=1.5 steps=480 evaluate.samples=1000

# Images optimised directly in the place of every generator of images, in as many seconds, three seeds, for the report's table: two hours and a half.
pixels: $(VENV)/installed
	python -m stages.pixels mnist
	python -m stages.pixels mnist_10
	python -m stages.pixels mnist_pair
	python -m stages.pixels mnist_plain
	python -m stages.pixels faces

# The whole pipeline with two other seeds, for the table of means: two to three hours. Starts from a clean commit; the same command goes on. Stages that did not change
# since an earlier commit are taken from the cache.
seeds: $(VENV)/installed
	git diff --exit-code --stat HEAD -- . ':!data/studies/seeds.csv'
	for seed in 1 2; do dvc exp list --name-only | grep -qx seed-$$seed || dvc exp run --temp --set-param seed=$$seed --name seed-$$seed; done
	for revision in HEAD seed-1 seed-2; do python -m stages.seeds $$revision; done

# Ten to a hundred images per class, and a quarter to twice the classifier's width, three seeds, for the report's figure: an hour and a half.
scaling: $(VENV)/installed
	python -m stages.scale mnist_10 'pretrain.mnist_10.hidden=[1000,2000]' train_single.mnist_10.length=2.4 steps=300 evaluate.samples=1000

# The round trip through real S3, SSH and WebDAV servers, started by the tests.
test-remotes: $(VENV)/installed
	pytest -v -m 'remotes or slow' tests/test_remotes.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
