# `make` alone lists the targets. They need Python 3.11 or newer; everything else is installed in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# written last: an environment without it is incomplete and is made anew
STAMP := $(VENV)/.complete

.DEFAULT_GOAL := help
.PHONY: help demo test test-all docs tutorials matrix gpu budgets mutants lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## simulate a network on an ECG; the results go to out/ecg
	$(BIN)/coba-triton simulate ecg --out out/ecg
	@echo "Open the picture: out/ecg/raster.png"

PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -p no:benchmark

test: $(STAMP) ## run the tests that take seconds each; they notice every planted bug
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP) ## run all tests, as before a change is shared
	$(PYTEST) $(ARGS)

docs: $(STAMP) ## build the site into site/; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Open site/index.html"

tutorials: $(STAMP) ## run the tutorials in examples/ and write their pages, docs/tutorials; takes two minutes
	$(PIP) install -c constraints.txt -e ".[tutorials]"
	PYTHONPATH=tests $(BIN)/python -m programs.tutorials --write

matrix: ## run the tests that depend on them with the lowest and the newest torch, triton and numpy; downloads gigabytes
	$(PYTHON) tests/programs/matrix.py $(ARGS)

gpu: ## check and measure on this machine's GPU, ten minutes at most; installs nothing
	$(PYTHON) bench/gpu.py $(ARGS)

budgets: $(STAMP) ## rewrite tests/budgets.json with what the compiled kernels need now, and print what changed
	PYTHONPATH=tests TRITON_INTERPRET=0 $(BIN)/python -m programs.budgets --write

mutants: $(STAMP) ## plant bugs in copies of the sources and list in docs/mutants.md which tests notice them; takes a while
	$(BIN)/python tests/programs/mutants.py $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

clean: ## remove the environment, builds and caches; out/ stays
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find . -name .git -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v $(firstword $(PYTHON)) >/dev/null || { \
	  echo "No '$(PYTHON)' was found. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "coba_triton needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	    "Name a newer one: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -c constraints.txt setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[test,dev,docs]"
	@touch $@
