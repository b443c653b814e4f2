# Needs Python 3.11+ and make; everything else goes into .venv, from the lock files.

VENV   := .venv
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input
# The first interpreter that is new enough; `make PYTHON=... run` names another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help run test test-runtimes check bench lock licenses clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

run: $(VENV)/.installed ## install from the lock and serve on 127.0.0.1:8700 (ARGS="--listen ...")
	@$(VENV)/bin/llm-gateway serve $(ARGS)

test: $(VENV)/.installed-dev ## the whole suite, without the tests that need a real runtime (ARGS="-k ...")
	$(VENV)/bin/python -m pytest $(ARGS)

test-runtimes: $(VENV)/.installed-dev ## build or reuse llama.cpp and a small model, and test against them
	$(VENV)/bin/python tests/runtimes/prepare.py
	$(VENV)/bin/python -m pytest tests/runtimes $(ARGS)

check: $(VENV)/.installed-dev ## lint, format, types, import rules
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -q tests/test_imports.py tests/test_house.py

bench: $(VENV)/.installed-dev ## compare with a bare proxy, nginx and no proxy (ARGS="...")
	$(VENV)/bin/python -m tests.bench $(ARGS)

# The stamps: an unchanged lock and setup.cfg install nothing. The dev lock holds the runtime lock, so it sets both.
$(VENV)/.installed: requirements.lock setup.cfg pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q --require-hashes -r requirements.lock
	$(PIP) install -q --no-deps --no-build-isolation --no-index -e .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock requirements.lock setup.cfg pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q --require-hashes -r requirements-dev.lock
	$(PIP) install -q --no-deps --no-build-isolation --no-index -e .
	@touch $(VENV)/.installed $@

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found: install one, or run make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment (Debian: apt-get install python3-venv)"; exit 1; }

lock: ## make the lock files again (UPGRADE=--upgrade for newer versions)
	deploy/lock.sh $(UPGRADE)

licenses: $(VENV)/.installed-dev ## make LICENSES.md's table of Python packages again
	$(VENV)/bin/python deploy/licenses.py

clean: ## remove the virtual environment and everything made (not the cached runtimes)
	rm -rf $(VENV) build dist bench-results *.egg-info .mypy_cache .ruff_cache .hypothesis .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
