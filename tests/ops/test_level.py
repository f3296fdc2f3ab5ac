"""Row loops are compiled once for each level of x86-64; all levels that this machine can run give the same bits."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tokcredit import ops

ROOT = Path(__file__).parents[2]
LEVELS = {"base": "-march=x86-64", "v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4"}
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
ROWS, LENGTH = 3, 700  # blocks, whole packs and a rest
MAIN = r"""
#include "cpu/baseline_rows.hpp"
#include "cpu/logits_rows.hpp"
#include "cpu/policy_loss_rows.hpp"
#include <cmath>
using namespace tokcredit;
extern "C" int can_run() { return TOKCREDIT_CAN_RUN; }
extern "C" void run(int type, int surrogate, int on, bool cumulative, double power, const int64_t *begin,
                    const int64_t *end, const bool *mask, int64_t rows, int64_t size, const void *log_probs,
                    const void *reference, const void *advantages, const void *low, const void *high, void *values,
                    double *stats, void *slopes) {
  PolicyLoss p{};
  p.rows = {begin, end, mask, rows, size};
  p.type = Type(type);
  p.log_probs = log_probs;
  p.reference = reference;
  p.advantages = p.given = {advantages, Per::token, 0};
  p.weights = {nullptr, Per::batch, 1};
  p.low = {low, Per::row, 0};
  p.high = {high, Per::row, 0};
  p.cap = {nullptr, Per::batch, INFINITY};
  p.surrogate = Surrogate(surrogate);
  p.source = cumulative ? Source::cumulative : Source::difference;
  p.on = Coordinate(on);
  p.bound = p.clamp_high = 20;
  p.clamp_low = -20;
  p.power = power;
  p.limit = 2;
  p.values = values;
  p.stats = stats;
  p.slopes = slopes;
  cpu::TOKCREDIT_LEVEL::policy_loss_rows(p, 0, rows);
}
extern "C" void logits(int type, int64_t rows, int64_t vocabulary, const void *x, const int64_t *tokens,
                       void *log_probs, void *entropies, void *squares, double *logsumexp, const void *slopes,
                       double softcap, void *grad) {
  Logits in{};
  in.rows = rows;
  in.vocabulary = in.ids = vocabulary;
  in.places = {rows, 0, vocabulary};
  in.type = Type(type);
  in.token_type = Type::i64;
  in.logits = x;
  in.tokens = tokens;
  in.temperature = 0.7;
  in.scale = 1;
  in.softcap = softcap;
  cpu::TOKCREDIT_LEVEL::logits_rows({in, log_probs, entropies, squares, nullptr, logsumexp}, 0, rows);
  cpu::TOKCREDIT_LEVEL::logits_gradient_rows({in, logsumexp, entropies, squares, slopes, slopes, slopes, nullptr,
                                              Type(type), in.places, grad}, 0, rows);
}
extern "C" void run_baseline(int type, bool per_row, const int64_t *begin, const int64_t *end, const bool *mask,
                             int64_t rows, int64_t size, const void *log_probs, const void *squares,
                             const void *rewards, void *advantages, void *returns) {
  const Baseline b{{begin, end, mask, rows, size}, Type(type), nullptr, 1, log_probs, squares, rewards, per_row,
                   1e-8, advantages, returns};
  const int64_t members[] = {0, 1, 2};
  double to_go[3][8];
  cpu::Course courses[] = {{0, to_go[0]}, {0, to_go[1]}, {0, to_go[2]}};
  cpu::TOKCREDIT_LEVEL::baseline_group(b, members, 3, courses);
}
"""


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("levels")
    (folder / "main.cpp").write_text(MAIN)
    libraries = {}
    for level, march in LEVELS.items():
        test = "1" if level == "base" else f'__builtin_cpu_supports("{march.removeprefix("-march=")}")'
        command = [compiler, *FLAGS, march, "-Wno-psabi", f"-I{ROOT / 'csrc'}", "-DTOKCREDIT_LEVELS"]
        command += [f"-DTOKCREDIT_LEVEL={level}", f"-DTOKCREDIT_CAN_RUN={test}"]
        command += ["main.cpp", *map(str, (ROOT / "csrc/cpu").glob("*_rows.cpp")), "-o", f"{level}.so"]
        if subprocess.run(command, cwd=folder, capture_output=True).returncode:
            continue  # a compiler or a machine of another kind
        library = ctypes.CDLL(str(folder / f"{level}.so"))
        if library.can_run():
            libraries[level] = library
    if len(libraries) < 2:
        pytest.skip("one level only")
    return libraries


def pointer(x):
    return ctypes.c_void_p(x.data_ptr())


CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_levels_share_no_function(levels):
    """The linker keeps one copy of a weak function for all files: it must not be one for a larger machine."""
    for library in levels.values():
        symbols = subprocess.run(["nm", library._name], capture_output=True, text=True, check=True).stdout
        assert "policy_loss_rows" in symbols and "baseline_group" in symbols
        assert not [line for line in symbols.splitlines() if " W " in line]


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("cumulative", [False, True])
def test_policy_loss(levels, dtype, cumulative):
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    size = ROWS * LENGTH
    begin = torch.arange(ROWS) * LENGTH
    end = begin + torch.tensor([LENGTH, LENGTH - 37, 5])
    mask = torch.rand(size) > 0.1
    log_probs = -torch.rand(size, dtype=torch.float64).to(dtype)
    reference = (log_probs.double() + 0.3 * torch.randn(size, dtype=torch.float64)).to(dtype)
    advantages = torch.randn(size, dtype=wide)
    low, high = -torch.rand(ROWS, dtype=wide), torch.rand(ROWS, dtype=wide)
    gated = ops.SURROGATES.index("gated")
    cases = [(kind, 0) for kind in range(len(ops.SURROGATES))] + [(gated, on) for on in range(len(ops.COORDINATES))]
    for surrogate, on in cases:
        results = []
        for library in levels.values():
            values, stats = torch.zeros(ROWS, dtype=wide), torch.zeros(ROWS, len(ops.LOSS_STATS), dtype=torch.float64)
            slopes = torch.zeros(size, dtype=wide)
            library.run(
                CODES[dtype],
                surrogate,
                on,
                cumulative,
                ctypes.c_double(0.5 if cumulative else 0.0),
                *map(pointer, (begin, end, mask)),
                ctypes.c_int64(ROWS),
                ctypes.c_int64(size),
                *map(pointer, (log_probs, reference, advantages, low, high, values, stats, slopes)),
            )
            assert stats[:, 1].tolist() == [mask[b:e].sum() for b, e in zip(begin, end, strict=True)]
            assert slopes.abs().sum() > 0
            results.append((values, stats, slopes))
        for result in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("softcap", [math.inf, 3.0])
def test_logits(levels, dtype, softcap):
    torch.manual_seed(0)
    wide, size = torch.float64 if dtype == torch.float64 else torch.float32, 1500
    x = (5 * torch.randn(ROWS, size, dtype=torch.float64)).to(dtype)
    tokens, slopes = torch.tensor([3, 1499, -1]), torch.randn(ROWS, dtype=wide)
    results = []
    for library in levels.values():
        log_probs, entropies, squares, logsumexp = (torch.zeros(ROWS, dtype=t) for t in (*[wide] * 3, torch.float64))
        grad = torch.ones_like(x)
        sizes = (ctypes.c_int64(ROWS), ctypes.c_int64(size))
        tensors = (x, tokens, log_probs, entropies, squares, logsumexp, slopes)
        library.logits(CODES[dtype], *sizes, *map(pointer, tensors), ctypes.c_double(softcap), pointer(grad))
        assert log_probs[:2].max() < 0 < min(entropies[:2].min(), squares[:2].min())
        assert grad[:2].abs().min(1).values.max() >= 0 == grad[2].abs().max()
        results.append((log_probs, entropies, squares, logsumexp, grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("per_row", [False, True])
def test_baseline(levels, dtype, per_row):
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    length = 2500  # two whole stretches and a part
    size = ROWS * length
    begin = torch.arange(ROWS) * length
    end = begin + torch.tensor([length, length - 37, 5])
    mask = torch.rand(size) > 0.1
    p = torch.rand(size, dtype=torch.float64)
    log_probs, squares = p.log().to(dtype), (p**2 + 0.2 * (1 - p) ** 2).to(dtype)
    rewards = torch.randn(ROWS if per_row else size, dtype=torch.float64).to(dtype)
    results = []
    for library in levels.values():
        out = torch.zeros(2, size, dtype=wide)
        library.run_baseline(
            CODES[dtype],
            per_row,
            *map(pointer, (begin, end, mask)),
            ctypes.c_int64(ROWS),
            ctypes.c_int64(size),
            *map(pointer, (log_probs, squares, rewards, *out)),
        )
        assert not out[:, ~mask].any() and (out[0] != out[1]).any()
        results.append(out)
    assert all(torch.equal(out, results[0]) for out in results[1:])
