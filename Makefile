# Two commands do all set-up on a machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

VENV_COMPOSER ?= .venv-composer

.PHONY: help demo test test-composer check format benchmarks clean
.DEFAULT_GOAL := help

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

demo: $(VENV)/.installed  ## install, compare the paper's methods on real digits, say where the report is
	$(BIN)/stockpot run recipes/digits.yaml

test: $(VENV)/.installed-dev  ## install and run the tests (STOCKPOT_DATA=folder adds those on real data sets)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)  # DeepSpeed builds with ninja

test-composer: $(VENV_COMPOSER)/.installed  ## the Composer adapter and averaging, in an environment of its own (5.4 GB)
	PYTHONPATH=src $(VENV_COMPOSER)/bin/python -m pytest tests/integrations/test_composer.py tests/averaging/test_sfa.py tests/averaging/test_blend.py tests/averaging/test_schedule.py

check: $(VENV)/.installed-dev  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(VENV)/.installed-dev  ## steps per second against a bare loop (AVALANCHE=python adds that peer), the cost of averaging, merging against mergekit, tokenising against TRL
	$(BIN)/python benchmarks/step_overhead.py $(if $(AVALANCHE),--avalanche $(AVALANCHE))
	$(BIN)/python benchmarks/averaging.py
	$(BIN)/python benchmarks/merge_vs_mergekit.py
	$(BIN)/python benchmarks/tokenising.py  # needs STOCKPOT_DATA, or a network
	$(BIN)/python benchmarks/report_page.py  # needs chromium

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) $(VENV_COMPOSER) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"stockpot needs Python 3.11 or newer; {sys.executable} is {v.major}.{v.minor}. Name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# torch first: what else needs it then finds the version that is wanted.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV_COMPOSER)/.installed:
	$(PYTHON) -m venv $(VENV_COMPOSER)
	@echo "installing Composer into $(VENV_COMPOSER) (some minutes)"
	@$(VENV_COMPOSER)/bin/python -m pip install --quiet mosaicml==0.32.1 safetensors pytest hypothesis
	@touch $@
