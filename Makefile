# make demo: install and train a small model.  make test: format, lint, types, tests.  make test-all: the slow ones too.
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/installed
	$(BIN)/craton demo

test: .venv/dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/python -m pytest

test-all: .venv/dev
	$(BIN)/python -m pytest -m ''

# torch first and alone: its CPU build satisfies everything that comes after.
.venv/installed: pyproject.toml setup.py constraints.txt web/package-lock.json \
    $(wildcard craton/model/*.cpp craton/model/*.h web/src/* web/build.mjs)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep ^torch== constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[parquet]'
	touch $@

.venv/dev: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The peers of benchmarks/, apart from .venv: litgpt needs NumPy 1.
bench-env: .venv-bench/installed

.venv-bench/installed: pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check $$(grep ^torch== constraints.txt)
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf .venv .venv-bench build runs craton.egg-info craton/model/*.so craton/serve/static web/node_modules

.PHONY: demo test test-all bench-env clean
