# The project's commands; `make` alone lists them.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
export OMP_NUM_THREADS ?= 2
# The certificates that the machine trusts, as pip does: a network may have its own.
export UV_SYSTEM_CERTS ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Images of Python often set it; then every process compiles all that it imports anew, a third of its time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo up test check benchmark lock clean

help: ## List these commands
	@grep -hE '^[a-z]+:.*?## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready ## Make .venv with everything in it (quick when nothing changed)

$(VENV)/.ready: requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip --quiet --disable-pip-version-check install 'uv>=0.9'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

demo: setup ## Carry the example model through its whole life on real data
	$(BIN)/mlops demo

up: setup ## Open the Dagster, MLflow and Evidently pages and the model servers
	$(BIN)/mlops up

test: setup ## Run all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: setup ## Ruff, pyright, import-linter, dg check, dagster definitions validate
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/dg check yaml
	$(BIN)/dagster definitions validate -w workspace.yaml

benchmark: setup ## Measure the headline figures beside their peers (ONLY=name for one)
	$(BIN)/python -m benchmarks $(ONLY)

lock: setup ## Write requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --all-extras --no-emit-package mlops-dagster --no-emit-package hydra-core --no-emit-package omegaconf \
		--no-header --no-annotate --override overrides.txt --output-file requirements.lock pyproject.toml

clean: ## Remove .venv and what the tools left
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
