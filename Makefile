# The one list of commands. Each does all its own set-up and is fast the second time.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test test-slow check chaos bench dist serve

help:  ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; give one with make PYTHON=…" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]' --group dev
	@touch $@

setup: $(STAMP)  ## make .venv with everything in it

demo: setup  ## train a small model against a reward service, through the real system
	@$(BIN)/dar demo

# More processes than cores: tests of whole installations wait for a third of their time.
PYTEST := $(BIN)/python -m pytest -q --dist loadfile --no-loadscope-reorder --durations 30

test: setup  ## run the fast tests: everything a change must not break
	@$(PYTEST) -n 5 -m "not slow"

test-slow: setup  ## run the slow tests: whole jobs, several processes, long training
	@$(PYTEST) -n 3 -m slow

check: setup  ## lint, format, types, import rules, dependencies, containers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/deptry .
	$(BIN)/hadolint docker/*.Dockerfile
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker/compose.yaml docker/gpu-host.yaml

chaos: setup  ## kill, freeze and cut off everything, and count what is lost; ROW=… runs one row
	@PYTHONPATH=tests $(BIN)/python -m chaos $(ROW) $(AGAIN)

bench: setup  ## measure; one JSON line per benchmark
	@for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

dist: setup  ## build a wheel, with its constraints, in dist/
	@rm -rf dist && mkdir dist && cp constraints.txt dist/
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist

serve: setup  ## run service, Valkey and one worker until Ctrl-C
	@$(BIN)/dar up
