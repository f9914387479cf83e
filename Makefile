PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
COMPILE = $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
	--custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# The OCI format, which podman and buildah write unless told otherwise, has no HEALTHCHECK.
BUILD_IMAGE = $(or $(if $(shell command -v docker),docker build),$(if $(shell command -v podman),podman build --format docker),buildah bud --format docker)

.DEFAULT_GOAL := help
.PHONY: help install demo dev test faults mutants bench lint format audit lock build image clean

help: ## List the commands
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## Create .venv with the worker and the embedded servers of the demo, locked by hash

$(VENV)/.installed: requirements-demo.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "viewer-worker needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python has no venv module; on Debian: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) from requirements-demo.lock ..."
	@$(PIP_INSTALL) --require-hashes -r requirements-demo.lock
	@$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

# Tests, lint and build need more.
$(VENV)/.tools: requirements-dev.lock $(VENV)/.installed
	@echo "Installing into $(VENV) from requirements-dev.lock ..."
	@$(PIP_INSTALL) --require-hashes -r requirements-dev.lock
	@touch $@

demo: install ## The main job on embedded servers: 20 s of traffic, a kill -9, a verdict
	@$(BIN)/viewer-worker dev --for 20s

dev: install ## The demo without an end (Ctrl-C stops it and prints the verdict)
	@$(BIN)/viewer-worker dev

test: $(VENV)/.tools ## All tests, on real embedded servers, two at a time
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

faults: $(VENV)/.tools ## A minute each of replicas killed and frozen, and of 50,000 messages/s; the property test, many examples
	@FAULT_SECONDS=60 MESSAGE_SECONDS=60 PROPERTY_EXAMPLES=300 $(BIN)/python -m pytest tests/faults tests/property -s --timeout 1200

mutants: $(VENV)/.tools ## Plant mistakes in a copy of the code, and see whether the tests catch each
	@$(BIN)/python tools/mutants.py

bench: $(VENV)/.tools ## How fast a backlog is carried, messages are heard and a view recorded, beside what one would write in an afternoon
	@$(BIN)/python benchmarks/flush.py
	@$(BIN)/python benchmarks/messages.py
	@$(BIN)/python benchmarks/producer.py

lint: $(VENV)/.tools ## ruff, mypy --strict, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/.tools ## Format and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

audit: $(VENV)/.tools ## Known vulnerabilities of what the worker runs on; needs a public service to ask
	@$(BIN)/pip-audit --strict --progress-spinner off --require-hashes --disable-pip --requirement requirements.lock

lock: ## Resolve the lock files anew (UPGRADE=1 takes newer versions)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(COMPILE) pyproject.toml --output-file requirements.lock
	@$(COMPILE) pyproject.toml --extra demo --group editable --constraint requirements.lock --output-file requirements-demo.lock
	@$(COMPILE) pyproject.toml --extra demo --extra dev --group editable --constraint requirements-demo.lock --output-file requirements-dev.lock
	@$(COMPILE) --group build --constraint requirements-dev.lock --output-file requirements-build.lock

build: $(VENV)/.tools ## The wheel, into dist/
	@$(BIN)/python -m hatchling build -t wheel

image: ## The container image viewer-worker:VERSION, by whichever of docker, podman, buildah is there
	@$(BUILD_IMAGE) --tag viewer-worker:$(VERSION) --build-arg VERSION=$(VERSION) \
		--build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) .

clean: ## Remove what these commands made
	rm -rf $(VENV) .dev dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
