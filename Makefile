# make demo    quantizes the embedded model and writes a report to demo-out/
# make test    linter, type checker and tests, as continuous integration runs them
#
# Both make a virtual environment in .venv, build the native library and install postquant there (editable); a second
# run does that again only after a change of pyproject.toml, constraints-dev.txt or the C++ sources.
PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= demo-out
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL_INPUTS := pyproject.toml constraints-dev.txt runtime_ops/CMakeLists.txt $(wildcard runtime_ops/csrc/*)

.PHONY: demo test lint types bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/postquant demo --out $(DEMO_OUT)

test: lint types
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python bench/accuracy.py --json bench-out/accuracy.json --markdown $(BENCH_ARGS)
	$(BIN)/python bench/calibration.py --json bench-out/calibration.json --markdown $(BENCH_ARGS)

clean:
	rm -rf build dist demo-out bench-out .mypy_cache .pytest_cache .ruff_cache .hypothesis $(VENV)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "postquant needs Python 3.11 or newer, found " + sys.version.split()[0] + "; name one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# The build tools are installed first, at their pinned versions, and the build uses them.
$(VENV)/.build-tools: constraints-dev.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints-dev.txt scikit-build-core cmake ninja
	touch $@

$(VENV)/.installed: $(INSTALL_INPUTS) $(VENV)/.build-tools
	$(PIP) install --quiet -c constraints-dev.txt --no-build-isolation --editable .
	touch $@

$(VENV)/.installed-dev: $(INSTALL_INPUTS) $(VENV)/.build-tools
	$(PIP) install --quiet -c constraints-dev.txt --no-build-isolation --editable '.[dev]'
	touch $(VENV)/.installed $@
