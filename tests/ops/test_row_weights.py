import pytest
import torch
from tokcredit import ops

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("counted", ops.COUNTED)
@pytest.mark.parametrize("given", [None, 0, 1000])
@pytest.mark.parametrize("length", [None, 64.0])
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_matches_definition(counted, given, length, rows):
    lengths = torch.arange(rows) * 7 % 5
    own = int(lengths.sum()) if counted == "tokens" else int((lengths > 0).sum())
    count = max(own if given is None else given, 1)
    weights = ops.row_weights(lengths, counted, given, length, 3.0)
    assert weights.dtype == torch.float64
    expected = [3 / (count * max(x, 1)) for x in lengths.tolist()] if length is None else 3 / (count * length)
    assert weights.tolist() == expected


def test_by_hand():
    assert ops.row_weights(torch.tensor([2, 0, 4]), "rows").tolist() == [0.25, 0.5, 0.125]


def test_opcheck():
    for by_length in (True, False):
        arguments = (torch.tensor([2, 0, 4]), -1, 1, by_length, 2.0, 1.0)
        torch.library.opcheck(torch.ops.tokcredit.row_weights.default, arguments)
