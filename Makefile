# make demo   train an embedding on drawn characters and write a report (runs/glyphs/report.html)
# make test   native and Python tests
# Both make their own .venv, install, build and run; the second time only what has changed.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp) CMakeLists.txt setup.py pyproject.toml
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'tests/native/*.cpp')

.PHONY: help demo test test-native test-python bench lint format sanitize dist clean

help:
	@sed -n 's/^# //p' $(firstword $(MAKEFILE_LIST))

$(VENV)/tools: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pddm_ext needs Python 3.10 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77" "cmake>=3.18,<5" ninja pybind11 numpy
	@touch $@

$(VENV)/installed: $(VENV)/tools $(NATIVE)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[train,test]'
	@touch $@

$(VENV)/bench: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[bench]'
	@touch $@

$(VENV)/lint: $(VENV)/tools
	$(BIN)/pip install --quiet --disable-pip-version-check ruff mypy clang-format build
	@touch $@

demo: $(VENV)/installed
	$(BIN)/pddm-ext train

test: test-native test-python

test-native: $(VENV)/tools
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/native -G Ninja
	$(BIN)/cmake --build build/native
	$(BIN)/ctest --test-dir build/native --output-on-failure

test-python: $(VENV)/installed
	$(BIN)/python -m pytest -n 2

# bench/results/cpu.json and the README's table, too: make bench STORE=--store
bench: $(VENV)/bench
	@mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-json=build/bench.json --benchmark-quiet -p no:cacheprovider
	$(BIN)/python bench/table.py build/bench.json $(STORE)

lint: $(VENV)/lint $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/python bench/table.py --check

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The native tests under the address and undefined-behaviour sanitizers.
sanitize: $(VENV)/tools
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -G Ninja -DPDDM_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

# A source archive, and a wheel built from it.
dist: $(VENV)/lint
	$(BIN)/python -m build --no-isolation --outdir dist

clean:
	rm -rf .venv build dist *.egg-info pddm_ext/*.so
