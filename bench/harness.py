"""Timing on a GPU: medians of CUDA events over inputs that rotate beyond the cache, beside the device's copy rate."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch


@dataclass
class Result:
    """One provider of one operation; ``share`` is its rate over the measured rate of a device copy."""

    operation: str
    shape: str
    provider: str
    milliseconds: float
    gigabytes_per_second: float
    share: float
    relative: float  # its time over ours


def milliseconds(body: Callable[[int], object], repeats: int = 30, warm: int = 5) -> float:
    """Median time of ``body(i)``; i counts calls, so that a body can choose another copy of its inputs each time."""
    for i in range(warm):
        body(i)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (start, end) in enumerate(events):
        start.record()
        body(warm + i)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def copies(make: Callable[[], tuple[torch.Tensor, ...]], beyond: int = 4) -> list[tuple[torch.Tensor, ...]]:
    """Enough copies of the inputs that going round them finds none in the second-level cache."""
    first = make()
    size = sum(x.nbytes for x in first)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [first, *(make() for _ in range(min(8, beyond * cache // max(size, 1))))]


def copy_rate(size: int = 1 << 30) -> float:
    """Bytes per second, read and written, of a device copy."""
    source, target = torch.empty(2, size, dtype=torch.uint8, device="cuda")
    return 2 * size / milliseconds(lambda _: target.copy_(source)) * 1e3


class Table:
    """Results as they come; prints a line for each."""

    def __init__(self) -> None:
        self.rate = copy_rate()
        self.results: list[Result] = []
        print(f"{torch.cuda.get_device_name()}, copy {self.rate / 1e9:.0f} GB/s, torch {torch.__version__}")

    def measure(
        self,
        operation: str,
        shape: str,
        make: Callable[[], tuple[torch.Tensor, ...]],
        moved: int,
        providers: dict[str, Callable[..., object]],
        check: Callable[[object, object], None] | None = None,
    ) -> None:
        """Times providers on the same inputs; ``moved`` is what must be read and written at least.

        The first provider is ours. ``check(ours, theirs)`` compares results before anything is timed.
        """
        inputs = copies(make)
        ours = None
        expected = next(iter(providers.values()))(*inputs[0])
        for name, provider in providers.items():
            try:
                if check is not None and ours is not None:
                    check(expected, provider(*inputs[0]))
                ms = milliseconds(lambda i, f=provider: f(*inputs[i % len(inputs)]))
            except torch.cuda.OutOfMemoryError:
                print(f"{operation:<28}{shape:<22}{name:<22} out of memory")
                torch.cuda.empty_cache()
                continue
            ours = ms if ours is None else ours
            rate = moved / ms * 1e3
            result = Result(operation, shape, name, ms, rate / 1e9, rate / self.rate, ms / ours)
            self.results.append(result)
            print(self.line(result), flush=True)
        inputs.clear()
        expected = None
        torch.cuda.empty_cache()

    @staticmethod
    def line(r: Result) -> str:
        return (
            f"{r.operation:<28}{r.shape:<22}{r.provider:<22}{r.milliseconds:>9.3f} ms"
            f"{r.gigabytes_per_second:>8.0f} GB/s{r.share:>6.0%} of copy{r.relative:>8.2f} x ours"
        )

    def summary(self) -> dict[str, object]:
        return {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy_gigabytes_per_second": self.rate / 1e9,
            "results": [asdict(r) for r in self.results],
        }
