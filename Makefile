# `make demo` and `make test` need nothing but Python 3.11-3.13 with venv: each sets up what it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch goes in first and alone: its pinned build must be in place before anything that depends on it is resolved.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DELETE_ON_ERROR:  # a half-made virtual environment has a python, but no pip
.PHONY: demo test test-peers lint clean

demo: $(VENV)/.run
	$(BIN)/python build.py demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist loadfile

# Against programs that are too large for every run of the tests; they go into an environment of their own.
test-peers:
	$(MAKE) VENV=.venv-peers .venv-peers/.peers
	.venv-peers/bin/python -m pytest -m peers

lint: $(VENV)/.lint
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/.peers: $(VENV)/.test
	$(PIP) --editable '.[peers]'
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) --editable '.[lint]'
	touch $@

clean:
	rm -rf $(VENV) .venv-peers out
