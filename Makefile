# `make demo` and `make test` need nothing but Python 3.10-3.13 with venv: each sets up what it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch goes in first and alone: its pinned build must be in place before anything that depends on it is resolved.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/.run
	$(BIN)/python build.py demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.lint
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) --editable '.[lint]'
	touch $@

clean:
	rm -rf $(VENV) out
