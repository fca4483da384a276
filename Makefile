# `make demo` and `make test` each work as the first command on a fresh clone.
# PIP_ARGS goes to pip: PIP_ARGS="--extra-index-url ..." to take another build of PyTorch.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
BIN := .venv/bin

# Waiting threads sleep instead of spinning: two torch processes on two cores run ten times faster.
export OMP_WAIT_POLICY = PASSIVE
export NO_MKDOCS_2_WARNING = 1

.PHONY: demo test test-all check docs lab bench

demo: .venv/installed                     ## train on real digits, then draw them in one step
	$(BIN)/python -m cmbook demo

test: check .venv/installed-dev           ## everything that must be true
	$(BIN)/python -m pytest -n 2 --dist loadscope --nbval -m "not slow"
	$(BIN)/mkdocs build --strict

test-all: test                            ## that, what takes long, and every planted mistake is noticed
	$(BIN)/python -m pytest -m slow
	$(BIN)/python benchmarks/mutations.py

check: .venv/installed-dev                ## style, types, spelling: seconds
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy && $(BIN)/codespell

docs: .venv/installed-dev                 ## the site, on http://localhost:8000
	$(BIN)/mkdocs serve

lab: .venv/installed-dev                  ## the notebooks
	$(BIN)/jupyter lab notebooks

bench: .venv/installed-dev                ## measure again what the docs claim
	for script in $(filter-out %/mutations.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@ .venv/installed
