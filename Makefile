# make demo   train an embedding on drawn characters and write a report (runs/glyphs/report.html)
# make test   native and Python tests, and the CUDA kernels emulated on the host
# Both make their own .venv, install, build and run; the second time only what has changed.
# make cuda   compile the CUDA kernels for every architecture; registers, shared memory and spills of each
# make test-cuda, make bench-cuda   the tests and benchmarks on a GPU

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu) CMakeLists.txt setup.py pyproject.toml
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp')

.PHONY: help demo test test-native test-python test-emulated test-arm cuda test-cuda bench bench-cuda results docs lint format sanitize dist clean

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

$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[docs]'
	@touch $@

$(VENV)/lint: $(VENV)/tools
	$(BIN)/pip install --quiet --disable-pip-version-check ruff mypy clang-format build
	@touch $@

demo: $(VENV)/installed
	$(BIN)/pddm-ext compare --data glyphs --methods pddm-anchor euclidean-anchor --seeds 1

test: test-native test-python test-emulated

test-native: $(VENV)/tools
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/native -G Ninja -DPDDM_CUDA=emulated
	$(BIN)/cmake --build build/native
	$(BIN)/ctest --test-dir build/native --output-on-failure

test-python: $(VENV)/installed
	$(BIN)/python -m pytest -n 2

# The CUDA kernels' own sources on the host, where they answer for CPU tensors; see tests/emulation.
EMULATED := build/emulated/package
$(EMULATED)/built: $(VENV)/installed $(wildcard tests/emulation/* pddm_ext/*.py)
	PDDM_CUDA=emulated $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --upgrade \
	  --target $(EMULATED) .
	@touch $@

test-emulated: $(EMULATED)/built
	PYTHONPATH=$(CURDIR)/$(EMULATED) $(BIN)/pytest -n 2 $(addprefix tests/test_,numerics.py mining.py gradients.py autograd.py laws.py emulation.py)

# make test-arm   the native tests, cross-compiled for 64-bit Arm and run under emulation: whether they pass, not how fast
test-arm: $(VENV)/tools
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || { \
	  echo "$$tool is missing; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }; done
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/arm -G Ninja -DPDDM_CUDA=off \
	  -DCMAKE_TOOLCHAIN_FILE="$(CURDIR)/tests/native/aarch64.cmake"
	$(BIN)/cmake --build build/arm
	$(BIN)/ctest --test-dir build/arm --output-on-failure -j 2

# nvcc of this machine, or else one of its own.
NVCC := $(or $(shell command -v nvcc),$(wildcard $(CUDA_HOME)/bin/nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
$(VENV)/nvcc: $(VENV)/tools
	$(if $(NVCC),,$(BIN)/pip install --quiet --disable-pip-version-check \
	  $(foreach part,cuda-nvcc cuda-runtime cuda-crt nvvm cuda-cccl,"nvidia-$(part)==13.0.*"))
	ln -sf $(or $(NVCC),$$(echo $(CURDIR)/$(VENV)/lib/python*/site-packages/nvidia/cu13/bin/nvcc)) $@

ARITHMETICS := $(addprefix pddm_cuda_,F32 F64 Tf32 Bf16 F16)
cuda: $(VENV)/nvcc
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/cuda -G Ninja -DPDDM_CUDA=on -DPDDM_NVCC=$$(readlink $(VENV)/nvcc) \
	  -DCMAKE_CUDA_FLAGS="-Xptxas -v" "-DCMAKE_CUDA_ARCHITECTURES=80-real;86-real;90a-real;100a-real;120-real" \
	  "-DCMAKE_CUDA_COMPILER_LAUNCHER=$(CURDIR)/$(BIN)/python;$(CURDIR)/tests/cuda/resources.py;keep"
	$(BIN)/cmake --build build/cuda --target cuda_shapes $(ARITHMETICS)
	$(BIN)/python tests/cuda/resources.py report build/cuda build/cuda/tests/emulation/cuda_shapes

# bench/results/cpu.json and the README's table, too: make bench STORE=--store
bench: $(VENV)/bench
	@mkdir -p build
	$(BIN)/python -m pytest bench/test_cpu.py --benchmark-json=build/bench-cpu.json --benchmark-quiet -p no:cacheprovider
	$(BIN)/python bench/table.py cpu build/bench-cpu.json $(STORE)

# On a machine with a GPU and a CUDA build of torch, in whatever Python has them: make test-cuda PYTHON=python3
CUDA_PACKAGE := build/cuda/package
$(CUDA_PACKAGE)/built: $(NATIVE) $(wildcard pddm_ext/*.py pddm_ext/workbench/* pddm_ext/workbench/*/*)
	PDDM_CUDA=on $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --upgrade \
	  --target $(CUDA_PACKAGE) .
	@touch $@

ON_CUDA := PYTHONPATH=$(CURDIR)/$(CUDA_PACKAGE):$$PYTHONPATH PDDM_TEST_DEVICE=cuda
NEED_EXTRAS := training methods backbones resuming cli compare splits drawings photos published evaluation report docs examples \
  adapters pml_miner pml_distance pml_loss pml_loops lightning sentence_transformers sklearn
# Not python -m pytest, which would find the source folder first.
PYTEST_CUDA := $(PYTHON) -c 'import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))'
test-cuda: $(CUDA_PACKAGE)/built
	$(ON_CUDA) $(PYTEST_CUDA) -q tests $(patsubst %,--ignore=tests/test_%.py,$(NEED_EXTRAS))
	$(ON_CUDA) compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) tests/cuda/small.py
	$(ON_CUDA) compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) tests/cuda/small.py

bench-cuda: $(CUDA_PACKAGE)/built
	$(ON_CUDA) $(PYTEST_CUDA) bench/test_cuda.py --benchmark-json=build/bench-cuda.json --benchmark-quiet \
	  -p no:cacheprovider
	PYTHONPATH=$(CURDIR)/$(CUDA_PACKAGE) $(PYTHON) bench/table.py cuda build/bench-cuda.json $(STORE)

# The grids behind docs/results.md, an hour on two cores: make results OMNIGLOT=folder of images_background_small1.zip
results: $(VENV)/installed
	$(BIN)/python bench/retrieval.py $(if $(OMNIGLOT),--omniglot $(OMNIGLOT))

# make docs   the site, build/docs/index.html; made anew each time, for what has warned once would not warn again
docs: $(VENV)/docs
	$(BIN)/sphinx-build --quiet --fresh-env --nitpicky --fail-on-warning --doctree-dir build/doctrees docs build/docs

lint: $(VENV)/lint $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/python bench/table.py --check
	$(BIN)/python bench/retrieval.py --check

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The native tests under the address and undefined-behaviour sanitizers.
sanitize: $(VENV)/tools
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -G Ninja -DPDDM_CUDA=emulated \
	  -DPDDM_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

# A source archive, and a wheel built from it.
dist: $(VENV)/lint
	$(BIN)/python -m build --no-isolation --outdir dist

clean:
	rm -rf .venv build dist *.egg-info pddm_ext/*.so
