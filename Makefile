# `make train`: the main job; `make test`: the whole suite.  Everything is installed into .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find csrc python -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' -o -path '*/assets/*') CMakeLists.txt pyproject.toml

# GNU OpenMP threads that spin while another program runs slow each other down many times; this bounds the spinning.
export GOMP_SPINCOUNT ?= 10000

# Kernels for the GPU of this machine, if it has one; a wheel for others is built with plain pip.
BUILD := $(if $(wildcard /dev/nvidia0),-C cmake.define.TOKCREDIT_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native,-C cmake.define.TOKCREDIT_CUDA=OFF)

.PHONY: train test sanitize lint bench bench-quick clean

.venv/tools: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -U pip
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt numpy tyro accelerate filelock gguf jinja2 math-verify matplotlib pyarrow reasoning_gym rich \
	  tensorboard tqdm transformers
	$(BIN)/pip install -q -c constraints.txt pytest pytest-benchmark pytest-randomly pytest-timeout hypothesis scipy selenium ruff mypy clang-format
	touch $@

.venv/installed: .venv/tools $(SOURCES)
	$(BIN)/pip install -q -c constraints.txt --no-deps --force-reinstall $(BUILD) .
	touch $@

train: .venv/installed
	$(BIN)/tokcredit train --resume $(ARGS)

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

# Tests of the native operations on a module that stops at memory errors and undefined behaviour. Python itself is not
# built so: the sanitizer comes first in the process, and what the interpreter leaks is not counted.
sanitize: export PATH := $(abspath $(BIN)):$(PATH)
sanitize: .venv/tools
	$(BIN)/pip install -q -c constraints.txt cmake ninja pybind11
	cmake --preset sanitize -DPython_EXECUTABLE=$(abspath $(BIN)/python) >/dev/null
	cmake --build --preset sanitize
	rm -rf build/sanitize/site && mkdir build/sanitize/site && cp -r python/tokcredit build/sanitize/site
	cmake --install build/sanitize --prefix build/sanitize/site >/dev/null
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize/site OMP_NUM_THREADS=1 \
	  python -m pytest -s tests/ops tests/blocks --ignore tests/ops/test_level.py $(ARGS)

lint: .venv/tools
	$(BIN)/ruff check python tests bench docs examples
	$(BIN)/ruff format --check python tests bench docs examples
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

# Beside the incumbents, in an environment of their own (requirements/bench.txt); `make bench RUN="runs/A runs/B"`
# adds the share of those runs' steps. `bench-quick` takes small inputs and changes nothing.
bench: .venv-bench/installed
	.venv-bench/bin/python bench/report.py $(if $(RUN),--run $(RUN)) $(ARGS)

bench-quick: .venv-bench/installed
	.venv-bench/bin/python -m pytest -q -p no:randomly bench
	.venv-bench/bin/python bench/report.py --quick

clean:
	rm -rf .venv .venv-* build

include hosts.mk
