PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
COMPILE = $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
	--custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# The OCI format, the default of podman and buildah, has no HEALTHCHECK.
BUILD_IMAGE = $(or $(if $(shell command -v docker),docker build),$(if $(shell command -v podman),podman build --format docker),buildah bud --format docker)

.DEFAULT_GOAL := help
.PHONY: help install demo dev test faults mutants bench lint format docs audit proto lock build image clean

help: ## List the commands
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## Create .venv with the worker and the demo's embedded servers, versions locked by hash

$(VENV)/.installed: requirements-demo.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "viewer-worker needs Python 3.11 or newer; choose one: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python has no venv module; on Debian: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) from requirements-demo.lock ..."
	@$(PIP_INSTALL) --require-hashes -r requirements-demo.lock
	@$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

# Tests, lint and build need more.
$(VENV)/.tools: requirements-dev.lock requirements-data.lock requirements-client.lock $(VENV)/.installed
	@echo "Installing into $(VENV) from requirements-dev.lock, requirements-data.lock and requirements-client.lock ..."
	@$(PIP_INSTALL) --require-hashes -r requirements-dev.lock
	@$(PIP_INSTALL) --require-hashes --no-deps -r requirements-data.lock
	@$(PIP_INSTALL) --require-hashes --no-deps --upgrade --target $(VENV)/client -r requirements-client.lock
	@touch $@

demo: install ## Run the worker on embedded servers: 20 s of traffic, a kill -9, a pass/fail report
	@$(BIN)/viewer-worker dev --for 20s

dev: install ## The same until Ctrl-C, which prints the report
	@$(BIN)/viewer-worker dev

test: $(VENV)/.tools ## Run all tests on real embedded servers, two at a time
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

faults: $(VENV)/.tools ## Run the long tests: replicas and servers fail, 50,000 messages/s (a minute each), property test with many examples
	@FAULT_SECONDS=60 MESSAGE_SECONDS=60 PROPERTY_EXAMPLES=300 $(BIN)/python -m pytest tests/faults tests/property -s --timeout 1200

mutants: $(VENV)/.tools ## Insert mistakes into a copy of the code, one at a time, and check that the tests catch each
	@$(BIN)/python tools/mutants.py

bench: $(VENV)/.tools ## Measure flushing, receiving messages and recording views against naive implementations
	@$(BIN)/python benchmarks/flush.py
	@KEYS=1000000 ROUNDS=1 $(BIN)/python benchmarks/flush.py
	@$(BIN)/python benchmarks/streams.py
	@$(BIN)/python benchmarks/writer.py
	@$(BIN)/python benchmarks/sessions.py
	@$(BIN)/python benchmarks/metric_calls.py
	@$(BIN)/python benchmarks/messages.py
	@$(BIN)/python benchmarks/producer.py

lint: $(VENV)/.tools ## Run ruff, mypy --strict and import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/.tools ## Format and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(VENV)/.tools ## Build the documentation's site into build/site; a broken link is an error
	@$(BIN)/python -m sphinx --quiet --fresh-env --fail-on-warning --conf-dir docs --doctree-dir build/doctrees . build/site
	@echo "Built build/site/index.html"

audit: $(VENV)/.tools ## Look up known vulnerabilities of the worker's dependencies in a public database (needs the network)
	@$(BIN)/pip-audit --strict --progress-spinner off --require-hashes --disable-pip --requirement requirements.lock

proto: $(VENV)/.tools ## Generate the Python code of proto/ again
	@$(BIN)/python -m grpc_tools.protoc --proto_path=proto --python_out=worker/rpc --pyi_out=worker/rpc analytics/v1/analytics.proto

lock: ## Write the lock files again (UPGRADE=1: with the newest versions)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(COMPILE) pyproject.toml --extra grpc --output-file requirements.lock
	@$(COMPILE) pyproject.toml --extra grpc --extra demo --group editable --constraint requirements.lock --output-file requirements-demo.lock
	@$(COMPILE) pyproject.toml --extra grpc --extra demo --extra dev --group editable --constraint requirements-demo.lock --output-file requirements-dev.lock
	@$(COMPILE) --group build --constraint requirements-dev.lock --output-file requirements-build.lock
	@$(COMPILE) --group data --no-deps --output-file requirements-data.lock
	@$(COMPILE) --group client --no-deps --output-file requirements-client.lock

build: $(VENV)/.tools ## Build the wheel into dist/
	@$(BIN)/python -m hatchling build -t wheel

image: ## Build the container image viewer-worker:VERSION with docker, podman or buildah
	@$(BUILD_IMAGE) --tag viewer-worker:$(VERSION) --build-arg VERSION=$(VERSION) \
		--build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) .

clean: ## Remove everything that these commands created
	rm -rf $(VENV) .dev dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
