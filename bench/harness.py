"""Named providers of one operation, compared and then timed side by side, on a GPU or a CPU.

A rate counts the bytes that must be read and written at least, so the share of the copy rate is what is left of the
best possible.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import tokcredit as tc
import torch

Inputs = tuple[object, ...]


@dataclass
class Result:
    """One provider of one operation; ``share`` is its rate over the measured rate of a copy on the device."""

    operation: str
    shape: str
    provider: str
    milliseconds: float
    gigabytes_per_second: float
    share: float
    relative: float  # its time over ours
    megabytes: float | None = None  # peak memory beyond what there was before the call
    target: float | None = None  # the least `relative` we want


class Gpu:
    """Medians of CUDA events over inputs that rotate beyond the cache."""

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()

    def copies(self, make: Callable[[], Inputs], beyond: int = 4) -> list[Inputs]:
        """Enough copies of the inputs that going round them finds none in the second-level cache."""
        first = make()
        size = sum(x.nbytes for x in first)
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return [first, *(make() for _ in range(min(8, beyond * cache // max(size, 1))))]

    def milliseconds(self, bodies: dict[str, Callable[[int], object]], repeats: int = 30) -> dict[str, float]:
        """``body(i)``: i counts calls, so that a body can choose another copy of its inputs each time."""
        medians = {}
        for name, body in bodies.items():
            try:
                medians[name] = self.median(body, repeats)
            except torch.cuda.OutOfMemoryError:
                print(f"{name}: out of memory")
                self.release()
        return medians

    @staticmethod
    def median(body: Callable[[int], object], repeats: int) -> float:
        for i in range(5):
            body(i)
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for i, (start, end) in enumerate(events):
            start.record()
            body(5 + i)
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    def megabytes(self, body: Callable[[int], object]) -> float:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        body(0)
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def release(self) -> None:
        torch.cuda.empty_cache()


class Cpu:
    """Medians of wall time; providers take turns, so that another program on the machine slows all of them."""

    seconds = 1.0  # for each provider of an operation

    def __init__(self) -> None:
        model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        name = model[1] if model else platform.processor()
        self.name = f"{len(os.sched_getaffinity(0))} cores of {name}"

    def copies(self, make: Callable[[], Inputs]) -> list[Inputs]:
        return [make()]

    def milliseconds(self, bodies: dict[str, Callable[[int], object]]) -> dict[str, float]:
        def once(body: Callable[[int], object]) -> float:
            start = time.perf_counter()
            body(0)
            return time.perf_counter() - start

        first = {name: once(body) for name, body in bodies.items()}
        # Three calls at least, or two where one takes more than a second.
        calls = {name: max(3 if s < 1 else 2, min(30, int(self.seconds / max(s, 1e-6)))) for name, s in first.items()}
        times: dict[str, list[float]] = {name: [] for name in bodies}
        for turn in range(max(calls.values())):
            for name, body in bodies.items():
                if turn < calls[name]:
                    if first[name] < 1:
                        self.settle(body)
                    times[name].append(once(body))
        return {name: 1e3 * statistics.median(x) for name, x in times.items()}

    @staticmethod
    def settle(body: Callable[[int], object], seconds: float = 0.02) -> None:
        """Gives back the memory that the provider before has used, and lets its threads fall asleep."""
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            body(0)

    def megabytes(self, body: Callable[[int], object]) -> float:
        def status(field: str) -> float:
            found = re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())
            return int(found[1]) / 2**10 if found else 0.0

        self.release()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before = status("VmRSS")
        body(0)
        return status("VmHWM") - before

    def release(self) -> None:
        gc.collect()
        tc.empty_cache()
        ctypes.CDLL(None).malloc_trim(0)


class Table:
    """Results as they come; prints a line for each."""

    def __init__(self, device: str = "cuda", patient: bool = True) -> None:
        self.patient = patient  # whether to wait for providers that are too slow to be called more than once
        self.device = Gpu() if device == "cuda" else Cpu()
        source, target = torch.empty(2, 1 << (30 if device == "cuda" else 28), dtype=torch.uint8, device=device)
        source.zero_()
        copy = self.device.milliseconds({"copy": lambda _: target.copy_(source)})["copy"]
        self.rate = 2 * source.nbytes / copy * 1e3
        self.results: list[Result] = []
        print(f"{self.device.name}, copy {self.rate / 1e9:.1f} GB/s, torch {torch.__version__}")

    def measure(
        self,
        operation: str,
        shape: str,
        make: Callable[[], Inputs],
        moved: int,
        providers: dict[str, Callable[..., object]],
        check: Callable[[object, object], None] | None = None,
        targets: dict[str, float] | None = None,
        once: dict[str, Callable[..., object]] | None = None,
    ) -> None:
        """Times providers on the same inputs; ``moved`` is what must be read and written at least.

        The first provider is ours. ``check(ours, theirs)`` compares results before anything is timed. ``once`` are
        providers too slow to be called more than once; their only call is timed and not compared. ``targets`` says by
        how much ours should be faster than each.
        """
        inputs = self.device.copies(make)
        expected = next(iter(providers.values()))(*inputs[0]) if check else None
        bodies = {}
        for name, provider in providers.items():
            try:
                if check is not None and bodies:
                    check(expected, provider(*inputs[0]))
                bodies[name] = lambda i, f=provider: f(*inputs[i % len(inputs)])
            except torch.cuda.OutOfMemoryError:
                print(f"{operation:<28}{shape:<22}{name:<22} out of memory")
                self.device.release()
        expected = None
        times = self.device.milliseconds(bodies)
        memory = {name: self.device.megabytes(bodies[name]) for name in times}
        for name, provider in (once or {}).items() if self.patient else ():
            start = time.perf_counter()
            provider(*inputs[0])
            times[name] = 1e3 * (time.perf_counter() - start)
        ours = next(iter(times.values()))
        for name, ms in times.items():
            rate = moved / ms * 1e3
            target = (targets or {}).get(name)
            share = rate / self.rate
            result = Result(operation, shape, name, ms, rate / 1e9, share, ms / ours, memory.get(name), target)
            self.results.append(result)
            print(self.line(result), flush=True)
        inputs.clear()
        bodies.clear()
        self.device.release()

    @staticmethod
    def line(r: Result) -> str:
        memory = "" if r.megabytes is None else f"{r.megabytes:>8.0f} MiB"
        target = "" if r.target is None else f"  wanted {r.target:g}{'' if r.relative >= r.target else '  MISSED'}"
        return (
            f"{r.operation:<30}{r.shape:<24}{r.provider:<26}{r.milliseconds:>10.3f} ms"
            f"{r.gigabytes_per_second:>7.1f} GB/s{r.share:>6.0%} of copy{memory}{r.relative:>9.2f} x ours{target}"
        )

    def summary(self) -> dict[str, object]:
        return {
            "device": self.device.name,
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "copy_gigabytes_per_second": self.rate / 1e9,
            "results": [asdict(r) for r in self.results],
        }


def main(stage: Callable[[Table, bool], None]) -> None:
    """Command line of a CPU script: ``[--quick] [--impatient] [--json FILE]``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="smaller inputs")
    parser.add_argument("--impatient", action="store_true", help="without what is too slow to be called twice")
    parser.add_argument("--json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    if options.quick:
        Cpu.seconds = 0.2
    table = Table("cpu", patient=not options.impatient)
    stage(table, options.quick)
    if options.json:
        Path(options.json).write_text(json.dumps(table.summary(), indent=1) + "\n")


def close(rtol: float = 1e-4, atol: float = 1e-5) -> Callable[[object, object], None]:
    """A comparison of tensors, or of tuples of them, at these tolerances."""

    def check(a: object, b: object) -> None:
        for x, y in zip(a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,), strict=True):
            torch.testing.assert_close(x.reshape(-1), y.reshape(-1), rtol=rtol, atol=atol, check_dtype=False)

    return check
