"""The native module takes torch tensors, and anything else is an error rather than a crash."""

import ctypes

import pytest
import torch
from tokcredit import _C
from torch._subclasses.fake_tensor import FakeTensorMode

EDGES = (torch.tensor([0]), torch.tensor([3]))


def scan(x):
    y, last = torch.empty(3), torch.empty(1)
    _C.scan(x, *EDGES, None, 1.0, None, None, False, False, y, last, 1)
    return y


def test_tensors_and_their_subclasses_are_taken():
    x = torch.tensor([1.0, 2.0, 3.0])
    assert scan(x).tolist() == scan(torch.nn.Parameter(x)).tolist() == [1.0, 3.0, 6.0]


@pytest.mark.parametrize("x", [None, [1.0, 2.0, 3.0], torch.ones(3).numpy()])
def test_other_objects_are_refused(x):
    with pytest.raises(TypeError, match=r"scan: x: expected torch\.Tensor, got"):
        scan(x)


def test_a_foreign_exchange_table_is_not_torchs():
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p] * 3
    memory, name = ctypes.create_string_buffer(64), ctypes.create_string_buffer(b"dlpack_exchange_api")
    memory[0] = 1
    foreign = type(
        "Foreign", (), {"__dlpack_c_exchange_api__": new(ctypes.addressof(memory), ctypes.addressof(name), None)}
    )
    with pytest.raises(TypeError, match=r"scan: x: expected torch\.Tensor, got Foreign"):
        scan(foreign())


@pytest.mark.filterwarnings("ignore")
def test_tensors_without_memory_are_refused():
    with FakeTensorMode():
        fake = torch.empty(3)
    with pytest.raises(ValueError, match="scan: x: expected a tensor with data"):
        scan(fake)
    with pytest.raises(RuntimeError, match="meta"):
        scan(torch.empty(3, device="meta"))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3, dtype=torch.complex64), "expected a float, int32, int64 or bool dtype"),
        (torch.ones(6)[::2], "expected a contiguous tensor"),
        (torch.ones(4), r"y: expected float32 \[4\], got float32 \[3\]"),
    ],
)
def test_wrong_tensors_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        scan(x)
