# Needs Python, make and, for the kernels, a C++ compiler; everything else is installed into .venv, or into
# the virtual environment that is active.

PYTHON ?= python3
# What to install where there is no PyTorch yet.
TORCH ?= torch==2.13.0
EXTRAS := test

ifdef VIRTUAL_ENV
  VENV := $(VIRTUAL_ENV)
else
  VENV := .venv
endif
# Quoted wherever it is used: the folder's name may hold spaces.
BIN := $(VENV)/bin
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
HAS_COMPILER := $(shell command -v $(firstword $(CXX)) || command -v c++ || command -v clang++)
# The C++ tests and the CUDA kernels for other cards are targets of the build tree that `install` leaves.
BUILD = build/cmake-$(shell "$(BIN)/python" -c 'import sys; print(sys.implementation.cache_tag)')
JOBS := $(shell getconf _NPROCESSORS_ONLN 2> /dev/null || echo 2)

# Without a GPU nothing that runs needs CUDA kernels, which take minutes: they stay where they are, and are compiled, for
# one architecture, by test-rare.
ifeq ($(shell command -v nvidia-smi),)
demo bench docs test arm-test abi-test: export KERNELMETA_BUILD ?= $(if $(wildcard kernelmeta/_native/libkernelmeta_cuda.so),auto,cpu)
demo bench docs test test-rare: export TORCH_CUDA_ARCH_LIST ?= 9.0
endif

.PHONY: help install test test-rare lint cpp-test cpp-test-rare cuda-rare arm-test torchvision-test abi-test py-test ops-test triton-test format demo bench docs gpu-check clean

help:
	@echo "make test    install, then linters, C++ tests under the sanitizers, Python tests"
	@echo "make test-rare  what takes long and rarely fails: other instruction sets, CUDA kernels, Triton's compiler"
	@echo "make demo    install, then train and evaluate on the built-in data"
	@echo "make bench   install, then the benchmarks"
	@echo "make docs    install, then the documentation, as a site in build/site"
	@echo "make gpu-check  with a GPU: tests there, compute-sanitizer, benchmarks, one JSON"
	@echo "make format  rewrite the sources as the linters want them"
	@echo "make clean   remove what was built, .venv too"

# (Nothing is compiled to bytecode beforehand: Python does that for what is imported, pip for everything.)
install:
	@test -x "$(BIN)/python" || $(PYTHON) -m venv "$(VENV)"
	@"$(BIN)/python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' \
	  || (echo "installing $(TORCH)" && "$(BIN)/python" -m pip install -q --no-compile "$(TORCH)")
	@echo "installing the build tools"
	@"$(BIN)/python" -m pip install -q --no-compile 'setuptools>=77' wheel 'cmake>=3.21' ninja 'pybind11>=2.12'
	@echo "compiling and installing kernelmeta"
	@"$(BIN)/python" -m pip install -q --no-compile --no-build-isolation -e '.[$(EXTRAS)]'

# Each of these uses one core, for a share of the time that two cores can divide.
test: install
	@$(MAKE) --no-print-directory -j $(JOBS) py-test cpp-test ops-test triton-test lint

lint:
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"
	"$(BIN)/clang-format" --dry-run -Werror $(CXX_FILES)

# $(call build,<target>): a target of the build tree that the library itself does not need.
build = "$(BIN)/cmake" -S . -B $(BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM="$$(cd "$(BIN)" && pwd)/ninja" \
  -DKERNELMETA_TESTS=ON > /dev/null && "$(BIN)/cmake" --build $(BUILD) --target $(1) -- --quiet

ifeq ($(HAS_COMPILER),)
cpp-test cpp-test-rare:
	@echo "SKIPPED: C++ tests (no C++ compiler was found)"
else
cpp-test:
	$(call build,cpp_tests)
	"$(BIN)/ctest" --test-dir $(BUILD) --output-on-failure -j $(JOBS) -LE rare

cpp-test-rare:
	$(call build,cpp_tests_rare)
	"$(BIN)/ctest" --test-dir $(BUILD) --output-on-failure -j $(JOBS) -L rare
endif

# The CPU kernels for Arm, cross-compiled and run by an emulator: Debian's g++-aarch64-linux-gnu and qemu-user. (The
# sanitizer that looks for leaks does not run there.)
arm-test: install
	"$(BIN)/cmake" -S . -B build/arm -G Ninja -DCMAKE_MAKE_PROGRAM="$$(cd "$(BIN)" && pwd)/ninja" -DKERNELMETA_TESTS=ON \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu" > /dev/null
	"$(BIN)/cmake" --build build/arm --target dispatch_test engine_test anew_test golden_test -- --quiet
	ASAN_OPTIONS=detect_leaks=0 "$(BIN)/ctest" --test-dir build/arm --output-on-failure \
	  -R '^(dispatch_test|engine_test|anew_test|golden_test)$$'

# What needs torchvision, and with it another PyTorch: timm, torchvision and easyfsl, in an environment of their own, of
# 5.6 GB. The kernels are those that `install` left in this tree, if it did. Nothing may be skipped.
BESIDE = .venv-torchvision/bin/python
torchvision-test:
	@test -x $(BESIDE) || $(PYTHON) -m venv .venv-torchvision
	$(BESIDE) -m pip install -q --no-compile torch==2.14.1 torchvision==0.29.1
	$(BESIDE) -m pip install -q --no-compile easyfsl hypothesis matplotlib pillow pytest safetensors tensorboard timm tqdm
	$(BESIDE) -c "import easyfsl, timm, torchvision"
	PYTHONPATH="$(CURDIR)" $(BESIDE) -m pytest -p no:cacheprovider -k 'timm or torchvision or easyfsl' \
	  tests/test_examples.py tests/training/test_extraction.py

# Against the headers of the oldest PyTorch that is supported, whose wheel is downloaded (about 1 GB).
abi-test: install
	"$(BIN)/python" tools/abi_test.py 2.10.0

PYTEST = "$(BIN)/python" -m pytest -m 'not rare' --durations 10 --durations-min 2
py-test:
	$(PYTEST) --ignore tests/ops --ignore tests/triton_kernels

ops-test:
	$(PYTEST) -p no:cacheprovider tests/ops

triton-test:
	$(PYTEST) -p no:cacheprovider tests/triton_kernels

test-rare: install
	@$(MAKE) --no-print-directory cpp-test-rare cuda-rare
	"$(BIN)/python" -m pytest -m 'rare or cuda_build'

# Kernels for another card than the library's: what they take is held against limits.
cuda-rare:
	@if grep -qs '^KERNELMETA_CUDA:BOOL=ON' $(BUILD)/CMakeCache.txt; then set -x; $(call build,cuda_rare); \
	else echo "SKIPPED: CUDA kernels (this build has none)"; fi

format:
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .
	"$(BIN)/clang-format" -i $(CXX_FILES)

demo: install
	"$(BIN)/python" examples/demo.py

# About ten minutes together: the small grid, then the interleaved report with its table and plots.
bench: install
	@"$(BIN)/python" -m pip install -q --no-compile jax || echo "jax is not there: its rows are left out"
	"$(BIN)/python" -m pytest benchmarks -q --benchmark-max-time=0.3 --benchmark-min-rounds=3 \
	  --benchmark-columns=median,iqr,rounds
	"$(BIN)/python" -m benchmarks.report --seconds 1

docs: EXTRAS := test,docs
docs: install
	NO_MKDOCS_2_WARNING=1 "$(BIN)/python" -m mkdocs build --strict
	@echo "build/site/index.html"

# With whatever PyTorch that machine has: nothing is installed. PYTHON=... to choose the environment.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

clean:
	rm -rf build dist .venv *.egg-info kernelmeta/_native kernelmeta/_C.*.so
