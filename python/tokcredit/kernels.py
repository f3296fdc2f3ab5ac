"""Which native kernels this process uses, and why it does not use others."""

from __future__ import annotations

import re

import torch

from tokcredit._C import build_info


def cpu() -> str:
    """Return the level of the x86-64 architecture whose loops run on the CPU, or ``generic``."""
    level: str = build_info()["cpu_level"]
    return level


def cuda() -> str:
    """Return the GPUs on which the CUDA kernels run, or the reason why they do not run."""
    build = build_info()
    if not build["cuda"]:
        return "not built; install a CUDA wheel, or build where nvcc is found"
    if torch.version.cuda is None:
        return "not used: this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "not used: torch finds no CUDA device"
    devices = range(torch.cuda.device_count())
    return "; ".join(
        _on(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i), build["cuda_architectures"])
        for i in devices
    )


def _on(name: str, capability: tuple[int, int], architectures: str) -> str:
    state = "active" if runs_on(capability, architectures) else f"not used: built for {architectures}"
    return f"{name} (sm_{capability[0]}{capability[1]}): {state}"


def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Return whether a GPU can run kernels that were built for some architectures.

    Machine code (``90-real``) runs on GPUs of the same major version and at least the same minor version. PTX
    (``90-virtual``, and ``90``, which is both) runs on all later GPUs. ``native`` was built for the GPU of the machine.

    Args:
        capability: Major and minor version of the GPU.
        architectures: CMake's list of architectures, separated by spaces, such as ``"80-real 120"``.
    """
    for entry in architectures.split():
        found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", entry)
        if found is None:
            return True
        built = int(found[1]), int(found[2])
        if found[3]:
            if built == capability:
                return True
        elif built <= capability and (found[4] != "-real" or built[0] == capability[0]):
            return True
    return False
