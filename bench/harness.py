"""Compare and time several implementations ("providers") of one operation side by side, on a GPU or a CPU.

A rate divides the bytes that an operation must read and write at least by the time. Its share of the measured rate of a
copy says how close the operation is to the limit of the memory.
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
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokcredit import ops
from torch.utils._python_dispatch import TorchDispatchMode

Inputs = tuple[object, ...]


@dataclass
class Result:
    """The measurement of one provider of one operation."""

    operation: str
    shape: str
    provider: str
    milliseconds: float
    gigabytes_per_second: float
    share: float  # of the measured rate of a copy on the device
    relative: float  # its time divided by ours
    megabytes: float | None = None  # peak memory that the call adds
    target: float | None = None  # the smallest `relative` that we want
    dispatched: dict[str, int] | None = None  # torch operations, by the function that dispatches them


class Dispatched(TorchDispatchMode):
    """Count the torch operations that are dispatched in the context, views included, by name.

    One of our native operations counts as one; what it does inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Gpu:
    """Medians of CUDA events. Inputs rotate, so that no call finds its inputs in the cache."""

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()

    def copies(self, make: Callable[[], Inputs], beyond: int = 4) -> list[Inputs]:
        """Return so many copies of the inputs that they exceed the second-level cache several times."""
        first = make()
        size = sum(x.nbytes for x in first)
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return [first, *(make() for _ in range(min(8, beyond * cache // max(size, 1))))]

    def milliseconds(self, bodies: dict[str, Callable[[int], object]], repeats: int = 30) -> dict[str, float]:
        """Return the median time of each body.

        ``body(i)`` is given the number of the call, by which it chooses a copy of its inputs.
        """
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
    """Medians of wall time. Providers take turns, so that another program on the machine slows all of them alike."""

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
        # At least three turns, or two where a call takes more than a second.
        turns = {name: max(3 if s < 1 else 2, min(30, int(self.seconds / max(s, 1e-6)))) for name, s in first.items()}
        times: dict[str, list[float]] = {name: [] for name in bodies}
        for turn in range(max(turns.values())):
            for name, body in bodies.items():
                if turn < turns[name]:
                    if first[name] < 0.25:
                        self.settle(body)
                    # A turn of a short call is several calls, 5 ms together.
                    times[name].extend(once(body) for _ in range(max(1, min(20, int(0.005 / first[name])))))
        return {name: 1e3 * statistics.median(x) for name, x in times.items()}

    @staticmethod
    def settle(body: Callable[[int], object], seconds: float = 0.02) -> None:
        """Call a provider for a while, so that the memory and the threads of the one before do not disturb it."""
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
        ops.empty_cache()
        ctypes.CDLL(None).malloc_trim(0)


class Table:
    """Collect results, and print a line for each."""

    def __init__(self, device: str = "cuda", patient: bool = True) -> None:
        self.patient = patient  # whether to wait for providers that are too slow to be called more than once
        self.device = Gpu() if device == "cuda" else Cpu()
        source, target = torch.empty(2, 1 << (30 if device == "cuda" else 28), dtype=torch.uint8, device=device)
        source.zero_()
        copy = self.device.milliseconds({"copy": lambda _: target.copy_(source)})["copy"]
        self.rate = 2 * source.nbytes / copy * 1e3
        self.results: list[Result] = []
        self.sections: dict[str, list[str]] = {}  # further lines of Markdown, by their heading
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
        dispatched: dict[str, int] | None = None,
    ) -> None:
        """Time providers on the same inputs.

        Args:
            operation: Name for the tables.
            shape: Size of the inputs, for the tables.
            make: Returns the inputs of one call.
            moved: Bytes that the operation must read and write at least.
            providers: Implementations by name; the first is ours.
            check: ``check(ours, theirs)`` compares results before anything is timed.
            targets: How many times faster ours should be, by provider.
            once: Providers that are too slow to be called twice. Their only call is timed and not compared.
            dispatched: Torch operations that ours dispatches.
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
            counts = dispatched if name == next(iter(providers)) else None
            result = Result(operation, shape, name, ms, rate / 1e9, share, ms / ours, memory.get(name), target, counts)
            self.results.append(result)
            print(self.line(result), flush=True)
        inputs.clear()
        bodies.clear()
        self.device.release()

    @staticmethod
    def line(r: Result) -> str:
        memory = "" if r.megabytes is None else f"{r.megabytes:>8.0f} MiB"
        target = "" if r.target is None else f"  wanted {r.target:g}{'' if r.relative >= r.target else '  MISSED'}"
        if r.dispatched:
            target += "  dispatched: " + ", ".join(f"{name} {count}" for name, count in r.dispatched.items())
        return (
            f"{r.operation:<36}{r.shape:<26}{r.provider:<26}{r.milliseconds:>10.3f} ms"
            f"{r.gigabytes_per_second:>7.1f} GB/s{r.share:>6.0%} of copy{memory}{r.relative:>9.2f} x ours{target}"
        )

    def summary(self) -> dict[str, object]:
        return {
            "device": self.device.name,
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "copy_gigabytes_per_second": self.rate / 1e9,
            "results": [asdict(r) for r in self.results],
            "sections": self.sections,
        }


def main(run: Callable[[Table, bool], None]) -> None:
    """Run a CPU script with its command line: ``[--quick] [--impatient] [--json FILE]``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="smaller inputs")
    parser.add_argument(
        "--impatient", action="store_true", help="without providers that are too slow to be called twice"
    )
    parser.add_argument("--json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    if options.quick:
        Cpu.seconds = 0.2
    table = Table("cpu", patient=not options.impatient)
    run(table, options.quick)
    if options.json:
        Path(options.json).write_text(json.dumps(table.summary(), indent=1) + "\n")


def close(rtol: float = 1e-4, atol: float = 1e-5) -> Callable[[object, object], None]:
    """Return a comparison of tensors, or of tuples of tensors, with these tolerances."""

    def check(a: object, b: object) -> None:
        for x, y in zip(a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,), strict=True):
            torch.testing.assert_close(x.reshape(-1), y.reshape(-1), rtol=rtol, atol=atol, check_dtype=False)

    return check
