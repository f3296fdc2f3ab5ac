#!/usr/bin/env bash
# Builds the wheel, runs the suite on the device and the sanitizer on the operations, and measures. It needs a GPU, torch
# for CUDA, nvcc, CMake, scikit-build-core, pybind11, pytest and hypothesis, but no network.
# The parts end after 430 s at most, and the wheel takes less than two minutes on sixteen cores: nine minutes together.
# Usage: bench/gpu.sh [RESULTS.json]
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(realpath -m "${1:-gpu.json}")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
architecture=$("$python" -c "import torch; print('%d%d-real' % torch.cuda.get_device_capability())") || exit 1

echo "== wheel for ${architecture%-real}"
PATH="$PATH:/usr/local/cuda/bin" "$python" -m pip wheel -q --no-deps --no-build-isolation -w "$work/wheel" \
  -C cmake.define.TOKCREDIT_CUDA=ON -C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$architecture" . || exit 1
"$python" -m pip install -q --no-deps --no-index --target "$work/site" "$work"/wheel/tokcredit-*.whl || exit 1
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c "import tokcredit, torch; print(tokcredit.build_info(), torch.__version__)" || exit 1

echo "== tests"
timeout 150 "$python" -m pytest -q -o addopts= -o filterwarnings= -p no:cacheprovider -W ignore \
  -k "cuda or device" tests || failed=1

if command -v compute-sanitizer >/dev/null || [ -x /usr/local/cuda/bin/compute-sanitizer ]; then
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer $tool"
    PATH="$PATH:/usr/local/cuda/bin" PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 55 \
      compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 --launch-timeout 60 \
      "$python" -m pytest -q -o addopts= -o filterwarnings= -p no:cacheprovider -W ignore \
      -k "cuda and (worked or by_hand or duplicates or vocabulary_sizes or cumulative_ratio or long_rows)" \
      tests/blocks tests/ops
    status=$?
    [ $status -eq 0 ] || { echo "compute-sanitizer $tool: exit status $status"; failed=1; }
  done
else
  echo "== compute-sanitizer: not on this machine"
fi

echo "== measurements"
timeout 170 "$python" bench/gpu.py --json "$results" || failed=1
exit $failed
