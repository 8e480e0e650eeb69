# drctl: two commands for a newcomer, `make demo` and `make test`; the rest is for developers.
SHELL := /bin/bash
.DELETE_ON_ERROR:
ifndef VENV
VENV := $(shell ./setup.sh --where)
endif
BIN := $(VENV)/bin

.PHONY: help setup check test test-long demo bench man clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what is missing: Debian packages, then the virtual environment
	@./setup.sh "$(VENV)"

check: setup ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: setup ## the fast tests (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-long: ## the long tests: fault injection, kill loops
	@./setup.sh --long "$(VENV)"
	$(BIN)/python -m pytest -q -m long --timeout 7200

demo: setup ## the main job on two real libvirt sites, from nothing to a failover
	$(BIN)/python -m drctl.lab.demo

bench: setup ## benchmarks against the named peers; results under benchmarks/results
	$(BIN)/python benchmarks/run.py

man: setup ## manual pages, made from the commands
	$(BIN)/python -m drctl.cli.manual man

clean: ## remove what make made here
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
