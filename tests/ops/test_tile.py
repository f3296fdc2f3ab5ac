"""The arithmetic that kernels share with the host, compiled for the host: tiles of flat buffers, keys of numbers."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

SOURCE = r"""
#include "math/order.hpp"
#include "math/tile.hpp"
using namespace tokcredit;
extern "C" {
int64_t size_of_tile() { return tile_size; }
int64_t tiles(int64_t size) { return tiles_of(size); }
int64_t part(int64_t tile, bool began_before) { return part_of(tile, began_before); }
bool one_tile(int64_t begin, int64_t end) { return in_one_tile(begin, end); }
bool aligned(uint64_t address) { return quads_aligned(reinterpret_cast<const float *>(address)); }
bool aligned_half(uint64_t address) { return quads_aligned(reinterpret_cast<const bf16 *>(address)); }
bool aligned_double(uint64_t address) { return quads_aligned(reinterpret_cast<const double *>(address)); }
uint32_t key32(float x) { return order_key(x); }
uint64_t key64(double x) { return order_key(x); }
float back32(uint32_t key) { return number_of(key); }
double back64(uint64_t key) { return number_of(key); }
}
"""


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("native")
    (folder / "tile.cpp").write_text(SOURCE)
    include = Path(__file__).parents[2] / "csrc"
    command = [
        compiler,
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Werror",
        f"-I{include}",
        "tile.cpp",
        "-o",
        "tile.so",
    ]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "tile.so"))
    for names, result, arguments in (
        (("size_of_tile",), ctypes.c_int64, []),
        (("tiles",), ctypes.c_int64, [ctypes.c_int64]),
        (("part",), ctypes.c_int64, [ctypes.c_int64, ctypes.c_bool]),
        (("one_tile",), ctypes.c_bool, [ctypes.c_int64] * 2),
        (("aligned", "aligned_half", "aligned_double"), ctypes.c_bool, [ctypes.c_uint64]),
        (("key32",), ctypes.c_uint32, [ctypes.c_float]),
        (("key64",), ctypes.c_uint64, [ctypes.c_double]),
        (("back32",), ctypes.c_float, [ctypes.c_uint32]),
        (("back64",), ctypes.c_double, [ctypes.c_uint64]),
    ):
        for name in names:
            getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    return library


@given(st.integers(0, 2**40))
def test_tiles_cover_the_buffer(native, size):
    tile = native.size_of_tile()
    assert native.tiles(size) == math.ceil(size / tile)


@given(st.lists(st.integers(0, 1500), min_size=1, max_size=30))
def test_every_part_of_a_row_has_its_own_place(native, lengths):
    tile = native.size_of_tile()
    places, at = [], 0
    for length in lengths:
        begin, end, at = at, at + length, at + length
        meets = {t // tile for t in range(begin, end)}
        assert native.one_tile(begin, end) == (len(meets) <= 1)
        if len(meets) > 1:
            places += [native.part(k, k > begin // tile) for k in meets]
    assert len(set(places)) == len(places)
    assert all(0 <= place < 2 * native.tiles(at) for place in places)


def test_part_places_beyond_two_to_the_31(native):
    assert native.part(2**40, True) == 2**41 and native.part(2**40, False) == 2**41 + 1
    assert native.one_tile(2**35, 2**35 + 512) and not native.one_tile(2**35 + 1, 2**35 + 513)


def test_alignment_of_quads(native):
    for address in range(4096, 4096 + 64, 4):
        assert native.aligned(address) == native.aligned_double(address) == (address % 16 == 0)
    for address in range(4096, 4096 + 32, 2):
        assert native.aligned_half(address) == (address % 8 == 0)


@pytest.mark.parametrize("bits", [32, 64])
@given(st.lists(st.floats(width=32), min_size=2, max_size=20))
def test_keys_order_as_numbers_do(native, bits, numbers):
    key, back = getattr(native, f"key{bits}"), getattr(native, f"back{bits}")
    # NaN last; 0 equal to -0: a stable sort by key is a stable sort of torch.
    x = torch.tensor(numbers, dtype=torch.float64)
    by_key = sorted(range(len(numbers)), key=lambda i: key(numbers[i]))
    assert by_key == torch.sort(x, stable=True).indices.tolist()
    for number in numbers:
        assert back(key(number)) == number or (math.isnan(number) and math.isnan(back(key(number))))
