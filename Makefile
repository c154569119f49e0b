# Everything sets up what it needs by itself, in .venv; `make` alone lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip takes the tested set; pyproject.toml says what else would do.
# Python compiles what it imports: to compile it all takes longer than to install it.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt

# Where PyPI tells of one release, advisories and all; a mirror of its files alone does not have it.
ADVISORIES := https://pypi.org/pypi/urllib3/2.8.0/json

# Files of tests side by side: much of their time is waiting for processes to start.
PARALLEL := --numprocesses 3 --dist loadfile --no-loadscope-reorder

export ORT_DISABLE_TELEMETRY := 1
export PYSPARK_PYTHON := $(abspath $(BIN)/python)
export SPARK_LOCAL_IP := 127.0.0.1

.DEFAULT_GOAL := help
.PHONY: help run test conformance soak test-wheel lint format docs build cluster-archive bench clean java python

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

run: $(VENV)/.core java ## Log the embedded model and run the job on the sample prompts
	@$(BIN)/phibatch log onnx --name phibatch-demo --alias champion \
	  --model-dir "$$($(BIN)/python -c 'from phibatch import demo; print(demo.MODEL_DIR)')"
	@$(BIN)/phibatch run --config conf/demo.yaml --show 10

test: $(VENV)/.dev java ## Run the tests, but for the long ones
	@$(BIN)/python -m pytest $(PARALLEL)

conformance: $(VENV)/.dev java ## Compare every architecture on every engine with transformers; WRITE=1 writes docs/architectures.md
	@PHIBATCH_WRITE_PAGE=$(WRITE) $(BIN)/python -m pytest tests/conformance

soak: $(VENV)/.dev java ## The long tests: parts that die, the documents, wheel and archive; some forty minutes
	@$(BIN)/python -m pytest -m soak

test-wheel: build java ## Run the same tests against the built wheel, in an environment of its own
	@rm -rf .venv-wheel && $(PYTHON) -m venv .venv-wheel
	@.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  "$$(ls dist/phibatch-*.whl)[dev]"
	@PYSPARK_PYTHON=$(abspath .venv-wheel/bin/python) .venv-wheel/bin/python -P -m pytest $(PARALLEL)

lint: $(VENV)/.dev ## Check style, types and, where there is a network, known vulnerabilities
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@if $(BIN)/python -c 'import urllib.request as r; r.urlopen("$(ADVISORIES)", timeout=3)' 2>/dev/null; \
	  then $(BIN)/pip-audit --skip-editable --progress-spinner off; \
	  else echo "$(ADVISORIES) can not be read: known vulnerabilities were not looked up"; fi

format: $(VENV)/.dev ## Put the code into the one style
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

docs: $(VENV)/.core ## Write docs/configuration.md anew
	@$(BIN)/python jobs/write_reference.py

build: $(VENV)/.dev ## Build the wheel into dist/
	@rm -rf dist && PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build --wheel --outdir dist . >/dev/null && ls dist

cluster-archive: build ## Pack what executors need, for spark-submit --archives (EXTRAS='[transformers]')
	@rm -rf .venv-archive && $(PYTHON) -m venv .venv-archive
	@.venv-archive/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  "$$(ls dist/phibatch-*.whl)$(EXTRAS)"
	@# Spark is the cluster's own.
	@.venv-archive/bin/python -m pip uninstall --quiet --yes pyspark pip
	@$(BIN)/venv-pack --quiet --force --prefix .venv-archive --output dist/phibatch-environment.tar.gz
	@rm -rf .venv-archive && ls -sh dist/phibatch-environment.tar.gz

bench: $(VENV)/.bench java ## Measure the ways of answering against each other (BENCH='--rounds 1 --rows 12')
	@$(BIN)/python jobs/benchmark.py $(BENCH)

clean: ## Remove what the targets have made
	rm -rf $(VENV) .venv-wheel .venv-archive dist output mlruns mlflow.db .mypy_cache .ruff_cache .pytest_cache

$(VENV)/.core: pyproject.toml constraints.txt | python
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing phibatch into $(VENV)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "installing what tests and lint need into $(VENV)"
	@$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.core
	@echo "installing what the benchmark needs into $(VENV)"
	@$(PIP) --editable '.[bench]'
	@touch $@

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "phibatch needs Python 3.11 or newer: run make PYTHON=/path/to/python3.11"; exit 1; }

java:
	@java -version >/dev/null 2>&1 || test -x "$$JAVA_HOME/bin/java" || \
	  { echo "Spark needs Java 17: install openjdk-17-jre-headless"; exit 1; }
