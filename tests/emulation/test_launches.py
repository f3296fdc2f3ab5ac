"""What operations cost the host, counted on the emulator: launches, and pieces of scratch."""

import pytest
import tokcredit as tc
import torch

from .fuzz import NODES
from .operations import names

pytestmark = pytest.mark.gpu

ROWS, GROUP, LENGTH = 1024, 16, 8
MOST = {"tree_build": (2, 1), "tree_fold": (1, 1), "tree_mean": (1, 1), "expand": (1, 0), "repack": (1, 0)}


def batch(emulator):
    """Arguments of all operations on the trees of groups of rows that share prefixes."""
    numbers, nodes = torch.arange(ROWS), 2 * ROWS
    arguments = {
        "tokens": torch.randint(0, 2, (ROWS * LENGTH,)),
        "begin": numbers * LENGTH,
        "end": (numbers + 1) * LENGTH,
        "group": numbers // GROUP,
        "groups": ROWS // GROUP,
        "leaf": torch.empty(ROWS, dtype=torch.int64),
        **{k: torch.empty(nodes, dtype=torch.int64) for k in NODES},
        "size": torch.empty((), dtype=torch.int64),
        "x": torch.ones(ROWS),
        "row": torch.ones(ROWS),
        "body": torch.ones(nodes),
        "change": True,
        "source": numbers,
        "target": numbers * LENGTH,
        "threads": 1,
    }
    emulator.module.tree_build(*(arguments[name] for name in names("tree_build")))
    return arguments


@pytest.mark.parametrize("op", MOST)
def test_a_batch_takes_few_launches(emulator, op):
    arguments = batch(emulator)
    arguments["y"] = torch.empty(2 * ROWS if op in ("tree_fold", "tree_mean") else ROWS * LENGTH)
    if op == "repack":  # of rows; that of a tree is of nodes
        arguments["length"] = torch.ones(ROWS, dtype=torch.int64)
    given = [arguments.get(name) for name in names(op)]
    launches, allocations = emulator.work_of_host(lambda: getattr(emulator.module, op)(*given))
    assert launches <= MOST[op][0]
    assert allocations <= MOST[op][1]


def test_tempo_takes_six_launches(emulator):
    """Two for the tree, one for moments, one to standardize, one for changes of values, one to expand."""
    rollouts = tc.Rollouts(
        torch.randint(0, 2, (ROWS * LENGTH,)),
        torch.arange(ROWS + 1) * LENGTH,
        torch.arange(ROWS) // GROUP,
        torch.rand(ROWS),
    )
    credit = tc.methods.tempo().credit
    credit(rollouts)  # what the batch keeps is there
    launches, allocations = emulator.work_of_host(lambda: credit(rollouts))
    assert (launches, allocations) == (6, 2)


@pytest.mark.parametrize(("dtype", "ranks", "most"), [(torch.float32, False, 8), (torch.bfloat16, True, 4)])
def test_a_selection_takes_a_launch_for_each_digit(emulator, dtype, ranks, most):
    """Digits of eight bits: of the values, and of the places that decide ties; and a launch to begin and to end."""
    size = ROWS * LENGTH
    x, begin = torch.randn(size).to(dtype), torch.arange(ROWS) * LENGTH
    scope, wanted = torch.zeros(ROWS, dtype=torch.int64), torch.tensor([size // 3])
    y = torch.empty(1) if ranks else torch.empty(size, dtype=torch.bool)
    given = [x, begin, begin + LENGTH, None, scope, wanted, 1, 0.0, 0, 0, ranks, y, 1]
    launches, allocations = emulator.work_of_host(lambda: emulator.module.select(*given))
    assert launches <= most
    assert allocations <= 1
