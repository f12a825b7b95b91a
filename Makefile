# make demo: set up what is missing, then run the demo.   make help: all targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A local wheelhouse (UV_FIND_LINKS or PIP_FIND_LINKS) that holds torch is used as it is; else the CPU build of torch is asked for.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
TORCH := $(shell ls $(UV_FIND_LINKS)/torch-*.whl >/dev/null 2>&1 || echo --torch-backend=cpu)

.PHONY: help setup demo test lint lock
help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(STAMP) ## set up .venv (not repeated when nothing changed)

$(STAMP): cpu.lock pyproject.toml
	test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/pip install --quiet uv; }
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH) --no-deps -r cpu.lock -e .
	touch $@

demo: $(STAMP) ## the whole chain on the tiny pair: evidence, alignment, merges, vLLM, report
	$(BIN)/python -m rotrl

test: $(STAMP) ## every test, real vLLM included
	$(BIN)/python -m pytest

lint: $(STAMP) ## ruff, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

lock: $(STAMP) ## resolve the dependencies again
	@echo '# Python 3.11, Linux x86-64 CPU. Made by `make lock`; installed by `make setup`.' > cpu.lock
	$(BIN)/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 $(TORCH) --extra cpu --extra slurm --extra zoo --extra dev --upgrade pyproject.toml | sed 's/^torch==\([^+]*\)+cpu/torch==\1/' >> cpu.lock
