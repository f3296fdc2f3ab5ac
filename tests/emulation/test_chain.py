"""Rows that go from tile to tile wait for each other; how long such a chain of waits is, counted on the emulator."""

from pathlib import Path

import pytest
import torch
from tokcredit import Spans, ops

pytestmark = pytest.mark.gpu

# Lengths of the rows, and the stride from row to row (None: packed).
CASES = {
    "packed": ([2000 + 12_000 * (7 * i % 11) // 10 for i in range(24)], None),
    "padded": ([1000] * 120, 1024),
}
# Within a row a few, by when its neighbours happen to arrive. Where each row waits for the one before: hundreds.
MOST = 6
REACH = 32  # places that a look-back sees; 4,096 tokens each in scan, 512 in policy_loss


def spans_of(lengths, stride):
    lengths = torch.tensor(lengths)
    begin = torch.arange(len(lengths)) * stride if stride else lengths.cumsum(0) - lengths
    end = begin + lengths
    return Spans(begin, end, int(end[-1]))


def waits_of_scan(emulator, spans, reverse=False):
    x, y, last = torch.ones(spans.size), torch.empty(spans.size), torch.empty(spans.num_rows)

    def run():
        emulator.module.scan(x, spans.begin, spans.end, None, 1.0, None, None, reverse, False, y, last, 1)

    waits = emulator.longest_chain(run)
    assert torch.equal(last, spans.lengths.float())
    return waits


# What goes along a row: sums of log-ratios, or only the number of tokens before, by which bounds grow.
ALONG = {"cumulative": {"cumulative": True}, "growing": {"power": 0.5, "low": -0.1, "high": 0.1}}


def waits_of_policy_loss(emulator, spans, along="cumulative"):
    x, surrogate = torch.ones(spans.size), "clip" if along == "growing" else "k1"
    return emulator.longest_chain(lambda: ops.policy_loss(x, spans, surrogate, reference=x, **ALONG[along]))


@pytest.mark.usefixtures("emulator")  # is left out without a GPU or the emulator otherwise
def test_every_kernel_that_chains_is_here():
    cuda = Path(__file__).parents[2] / "csrc/cuda"
    assert {path.name for path in cuda.glob("*.cu") if "Chain<" in path.read_text()} == {"scan.cu", "policy_loss.cu"}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_scan_does_not_wait_for_rows_that_end(emulator, case, reverse):
    assert waits_of_scan(emulator, spans_of(*CASES[case]), reverse) <= MOST


@pytest.mark.parametrize(("case", "along"), [("packed", "cumulative"), ("padded", "cumulative"), ("padded", "growing")])
def test_policy_loss_does_not_wait_for_rows_that_end(emulator, case, along):
    assert waits_of_policy_loss(emulator, spans_of(*CASES[case]), along) <= MOST


# Long rows are scaled down from 10^6 tokens: with all blocks resident the emulator takes a second for 20,000.
def test_a_long_row_is_a_chain_of_look_backs(emulator):
    assert waits_of_scan(emulator, spans_of([400_000], None)) <= 400_000 // (REACH * 4096) + 2
    assert waits_of_policy_loss(emulator, spans_of([100_000], None)) <= 100_000 // (REACH * 512) + 2
