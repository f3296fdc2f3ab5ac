# `make train`: the main job; `make test`: the whole suite.  Everything is installed into .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find csrc python -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' -o -path '*/assets/*') CMakeLists.txt pyproject.toml

# GNU OpenMP threads that spin while another program runs slow each other down many times; this bounds the spinning.
export GOMP_SPINCOUNT ?= 10000

# Kernels for the GPU of this machine, if it has one; a wheel for others is built with plain pip.
BUILD := $(if $(wildcard /dev/nvidia0),-C cmake.define.TOKCREDIT_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native,-C cmake.define.TOKCREDIT_CUDA=OFF)

.PHONY: train test test-emulated lint bench bench-quick clean

.venv/tools: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -U pip
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt numpy tyro accelerate filelock gguf jinja2 math-verify matplotlib pyarrow reasoning_gym rich \
	  tensorboard tqdm transformers
	$(BIN)/pip install -q -c constraints.txt pybind11 pytest pytest-benchmark pytest-randomly pytest-timeout hypothesis scipy selenium ruff mypy clang-format
	touch $@

.venv/installed: .venv/tools $(SOURCES)
	$(BIN)/pip install -q -c constraints.txt --no-deps --force-reinstall $(BUILD) .
	touch $@

train: .venv/installed
	$(BIN)/tokcredit train --resume $(ARGS)

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

# The CUDA kernels on the host: no GPU and no nvcc, but g++ on x86-64 Linux. ARGS="--seconds 600" fuzzes for longer.
test-emulated: .venv/installed
	$(BIN)/python -m tests.emulation.run $(ARGS)

lint: .venv/tools
	$(BIN)/ruff check python tests bench docs examples
	$(BIN)/ruff format --check python tests bench docs examples
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests/emulation -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')
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
