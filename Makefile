# make demo    quantizes the embedded model and writes a report to demo-out/
# make test    linter, type checker and tests, as continuous integration runs them
#
# make bench              accuracy and cost on real models, ours beside onnxruntime's
# make bench-latency      time of layers and quantizers, ours beside onnxruntime's
# make bench-border       rounding borders, part by part
# make bench-bundle       time and size of the hand-over bundle
# make bench-learning     steps of learning per second: BENCH_ARGS="MODEL.onnx DATA.npz"
# make fuzz               random nodes through the operators, under sanitizers, for FUZZ_SECONDS
# make test-ort-versions  the operator library on old onnxruntimes, each in an environment in build/ort-versions
#
# All make a virtual environment in .venv, build the native library and install postquant there (editable); a second
# run does that again only after a change of pyproject.toml, constraints-dev.txt or the C++ sources.
PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= demo-out
PYTEST_ARGS ?=
PYTEST_WORKERS ?= auto
BENCH_ARGS ?=
FUZZ_SECONDS ?= 600
ORT_VERSIONS ?= 1.16.3 1.17.3 1.20.1 1.23.2 1.26.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL_INPUTS := pyproject.toml constraints-dev.txt runtime_ops/CMakeLists.txt $(wildcard runtime_ops/csrc/*)

.PHONY: demo test lint types bench bench-latency bench-border bench-bundle bench-learning fuzz test-ort-versions clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/postquant demo --out $(DEMO_OUT)

test: lint types
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python bench/accuracy.py --json bench-out/accuracy.json --markdown $(BENCH_ARGS)
	$(BIN)/python bench/calibration.py --json bench-out/calibration.json --markdown $(BENCH_ARGS)

bench-latency bench-border bench-bundle: bench-%: $(VENV)/.installed-dev
	$(BIN)/python bench/$*.py --json bench-out/$*.json --markdown $(BENCH_ARGS)

bench-learning: $(VENV)/.installed-dev
	$(BIN)/python bench/learning.py $(BENCH_ARGS)

# With clang on the machine: make fuzz CXX=clang++ FUZZ_BUILD=build/fuzz FUZZ_CMAKE=-DPOSTQUANT_LIBFUZZER=ON \
#   FUZZ_RUN=-max_total_time=600
FUZZ_BUILD ?= build/sanitize
FUZZ_CMAKE ?=
FUZZ_RUN ?= $$(date +%s) $(FUZZ_SECONDS) 1000000000
fuzz: $(VENV)/.build-tools
	$(BIN)/cmake -S runtime_ops -B $(FUZZ_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DPOSTQUANT_SANITIZE=ON -DPOSTQUANT_TEST_DRIVER=$(CURDIR)/tests/runtime_ops/native/fuzz_operators.cc $(FUZZ_CMAKE)
	$(BIN)/cmake --build $(FUZZ_BUILD) --target postquant_operator_test
	$(FUZZ_BUILD)/postquant_operator_test $(FUZZ_RUN)

# An environment that cannot be made (no wheel for this Python) is reported and left out.
ORT_ENVIRONMENTS := build/ort-versions
test-ort-versions: $(VENV)/.installed-dev
	@for version in $(ORT_VERSIONS); do \
	  environment=$(ORT_ENVIRONMENTS)/$$version; \
	  case $$version in 1.1[0-8].*) numpy='numpy<2' ;; *) numpy=numpy ;; esac; \
	  $$environment/bin/python -c 'import onnxruntime' 2>/dev/null || \
	  { $(BIN)/python -m venv --clear $$environment && \
	    $$environment/bin/python -m pip --disable-pip-version-check install --quiet "onnxruntime==$$version" "$$numpy"; } || \
	  { rm -rf $$environment; echo "onnxruntime $$version cannot be installed for this Python; it is left out"; }; \
	done
	POSTQUANT_ORT_VERSIONS=$(ORT_ENVIRONMENTS) $(BIN)/python -m pytest -v tests/runtime_ops/native/test_ort_versions.py

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
