import platform

import pytest
import tokcredit as tc
import torch
from tokcredit import kernels


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((8, 0), "80-real 90-real", True),
        ((8, 9), "80-real 90-real", True),  # same major version, later minor version
        ((7, 5), "80-real 90-real", False),
        ((10, 0), "80-real 90-real", False),  # machine code of another major version
        ((10, 0), "80-real 90", True),  # PTX of an earlier GPU
        ((10, 3), "90-virtual", True),
        ((8, 6), "90-virtual", False),
        ((9, 0), "90a", True),
        ((9, 1), "90a-real", False),
        ((12, 0), "native", True),
    ],
)
def test_runs_on(capability, architectures, expected):
    assert kernels.runs_on(capability, architectures) is expected


def build(monkeypatch, cuda, devices=()):
    info = {"cuda": cuda, "cuda_architectures": "80-real 90-real" if cuda else "", "cpu_level": "x86-64-v3"}
    monkeypatch.setattr(kernels, "build_info", lambda: info)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: devices[i][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: devices[i][1])


def test_cuda_says_why_not(monkeypatch):
    build(monkeypatch, False)
    assert kernels.cuda().startswith("not built;")
    build(monkeypatch, True)
    assert kernels.cuda() == "not used: torch finds no CUDA device"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert kernels.cuda() == "not used: this torch was built without CUDA"


def test_cuda_says_where(monkeypatch):
    build(monkeypatch, True, [("A", (9, 0)), ("B", (7, 5))])
    assert kernels.cuda() == "A (sm_90): active; B (sm_75): not used: built for 80-real 90-real"


def test_cpu():
    expected = ("x86-64", "x86-64-v3", "x86-64-v4") if platform.machine() == "x86_64" else ("generic",)
    assert kernels.cpu() in expected and kernels.cpu() == tc.build_info()["cpu_level"]
