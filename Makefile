# Needs Python, make and, for the kernels, a C++ compiler; everything else is installed into .venv, or into
# the virtual environment that is active.

PYTHON ?= python3
# What to install where there is no PyTorch yet.
TORCH ?= torch==2.13.0

ifdef VIRTUAL_ENV
  VENV := $(VIRTUAL_ENV)
else
  VENV := .venv
endif
BIN := $(VENV)/bin
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
HAS_COMPILER := $(shell command -v $(firstword $(CXX)) || command -v c++ || command -v clang++)

# Without a GPU: what runs needs no CUDA kernels; what is tested, those of two architectures. (All take long.)
ifeq ($(shell command -v nvidia-smi),)
demo bench: export KERNELMETA_BUILD ?= cpu
test: export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0
endif

.PHONY: help install test lint cpp-test py-test format demo bench gpu-check clean

help:
	@echo "make test    install, then linters, C++ tests under the sanitizers, Python tests"
	@echo "make demo    install, then train and evaluate on the built-in data"
	@echo "make bench   install, then the benchmarks"
	@echo "make gpu-check  with a GPU: build for it, tests, compute-sanitizer, benchmarks, one JSON"
	@echo "make format  rewrite the sources as the linters want them"
	@echo "make clean   remove what was built, .venv too"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

install: $(BIN)/python
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' \
	  || (echo "installing $(TORCH)" && $(BIN)/python -m pip install -q "$(TORCH)")
	@echo "installing the build tools"
	@$(BIN)/python -m pip install -q 'setuptools>=77' wheel 'cmake>=3.21' ninja 'pybind11>=2.12'
	@echo "compiling and installing kernelmeta"
	@$(BIN)/python -m pip install -q --no-build-isolation -e '.[test]'

test: install
	@$(MAKE) --no-print-directory lint cpp-test py-test

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

ifeq ($(HAS_COMPILER),)
cpp-test:
	@echo "SKIPPED: C++ tests (no C++ compiler was found)"
else
cpp-test:
	$(BIN)/cmake -S . -B build/cpp-tests -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DKERNELMETA_TESTS=ON -DKERNELMETA_LIBRARY=OFF > /dev/null
	$(BIN)/cmake --build build/cpp-tests
	$(BIN)/ctest --test-dir build/cpp-tests --output-on-failure
endif

py-test:
	$(BIN)/python -m pytest

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

demo: install
	$(BIN)/python examples/demo.py

# About ten minutes together: the small grid, then the interleaved report with its table and plots.
bench: install
	@$(BIN)/python -m pip install -q jax || echo "jax is not there: its rows are left out"
	$(BIN)/python -m pytest benchmarks -q --benchmark-max-time=0.3 --benchmark-min-rounds=3 \
	  --benchmark-columns=median,iqr,rounds
	$(BIN)/python -m benchmarks.report --seconds 1

# With whatever PyTorch that machine has: nothing is installed. PYTHON=... to choose the environment.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

clean:
	rm -rf build dist .venv *.egg-info kernelmeta/_native kernelmeta/_C.*.so
