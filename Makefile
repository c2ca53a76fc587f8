# Every target makes its own environment in .venv when it is missing. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test test-all lint bench clean

quickstart: $(VENV)/.installed
	$(BIN)/lcx run --config=configs/quickstart.py --workdir=runs/quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist=worksteal -m "not slow"

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist=worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/train_step.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "lcx needs Python 3.11 or newer; name one with make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing lcx into $(VENV), a minute or two"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what the tests need into $(VENV), a minute or two"
	$(INSTALL) --editable '.[dev]'
	@# Beside the packages, where only the tests that compile for TPUs look: jax would try to start a TPU with it, and say so.
	$(INSTALL) --upgrade --no-deps --target $(VENV)/libtpu "libtpu; sys_platform == 'linux' and platform_machine == 'x86_64'" \
		|| echo "no libtpu for this machine: tests that compile for TPUs will be skipped"
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	@echo "installing the benchmarks' peers into $(VENV)"
	$(INSTALL) --editable '.[bench]'
	@touch $@

clean:
	rm -rf $(VENV) runs
