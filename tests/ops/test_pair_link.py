import math

import pytest
import ragged
import reference.pair_link as reference
import torch
from tokcredit import ops
from tokcredit.ops import LinkTerm

pytestmark = pytest.mark.usefixtures("device")

TERMS = {
    name: (LinkTerm(name, 0.7, 1.5, -0.5, 0.2, 0.4), LinkTerm(name, -0.3, -1.0, 0.0, 0.1, 0.6))
    for name in ops.LINK_FUNCTIONS
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("full", [True, False])
def test_matches_definition(name, dtype, full):
    scores, terms = ragged.values(12, dtype) * 2, TERMS[name]
    pairs = torch.tensor([[3, 0], [11, 7], [2, 5], [1, 10]]) if full else torch.arange(12).view(-1, 2)
    divisors, weights = torch.arange(12) % 5, torch.rand(len(pairs), dtype=torch.float64)
    given = (pairs, divisors, weights, 0.25) if full else (None, None, None, 0.25)
    total, slopes, table = ops.pair_link(scores, terms, *given)
    plain = (divisors.tolist(), weights.tolist()) if full else ([1] * 12, [1] * 6)
    expected = reference.pair_link(scores.tolist(), terms, pairs.tolist(), *plain, 0.25)
    close = {"rel": 2e-6, "abs": 1e-6} if dtype == torch.float32 else {"rel": 1e-12, "abs": 1e-13}
    assert total.item() == pytest.approx(expected[0], **close)
    assert slopes.tolist() == pytest.approx(expected[1], **close)
    assert table.flatten().tolist() == pytest.approx([x for row in expected[2] for x in row], rel=1e-11, abs=1e-12)


def test_by_hand():
    terms = (LinkTerm("square", 1, 1, -1, 1),)
    total, slopes, table = ops.pair_link(torch.tensor([2.0, 1.0]), terms, torch.tensor([[0, 1]]), scale=0.5)
    assert (total.item(), slopes.tolist()) == (2.0, [2.0, -2.0])
    assert table.tolist() == [[4.0, 2.0, 1.0, 4.0, -4.0, 2.0, -2.0, 2.0]]


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("x", [-math.inf, -1e4, -800.0, 0.0, 800.0, 1e4, math.inf])
def test_large_scores(name, x):
    """The value is that of torch where torch's is finite, and no derivative is NaN."""
    terms = (LinkTerm(name, 1, 1, 0, 0, 0.5),)
    total, slopes, table = ops.pair_link(torch.tensor([x, math.nan], dtype=torch.float64), terms)
    expected = reference.value(name, torch.tensor(x, dtype=torch.float64), 0.5)
    if expected.isfinite():
        assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert not total.isnan() and not slopes[0].isnan() and not table[:, [0, 3, 5]].isnan().any()


@pytest.mark.parametrize("name", TERMS)
def test_nan_reaches_the_loss_and_both_slopes(name):
    terms = (LinkTerm(name, 1, 1, -1, 0, 0.5),)
    for scores in ([math.nan, 0.0], [0.0, math.nan], [math.inf, math.inf]):
        total, slopes, _ = ops.pair_link(torch.tensor([*scores, 1.0, 2.0]), terms)
        assert total.isnan() and slopes[:2].isnan().all() and slopes[2:].isfinite().all()


def test_rows_of_no_pair_and_no_pairs():
    terms = TERMS["logistic"]
    total, slopes, table = ops.pair_link(torch.ones(3), terms, torch.zeros(0, 2, dtype=torch.int64))
    assert (total.item(), slopes.tolist(), table.shape) == (0.0, [0.0] * 3, (0, len(ops.PAIR_COLUMNS)))
    assert ops.pair_link(torch.ones(4), ())[0].item() == 0


@pytest.mark.parametrize("name", TERMS)
def test_two_derivatives(name):
    scores = [(ragged.values(5, torch.float64)).requires_grad_() for _ in range(2)]
    evaluate = lambda a, b: ops.pair_losses(a, b, TERMS[name])  # noqa: E731
    torch.autograd.gradcheck(evaluate, scores)
    torch.autograd.gradgradcheck(evaluate, scores)


def test_opcheck():
    arguments = (torch.ones(4), torch.tensor([1, 2, 0, 1]), torch.tensor([[0, 1], [3, 2]]), None, [0], [1.0] * 5, 0.5)
    torch.library.opcheck(torch.ops.tokcredit.pair_link.default, arguments)


def test_compiled():
    scores = ragged.values(6, torch.float32)
    compiled = torch.compile(lambda x: ops.pair_link(x, TERMS["logistic"])[1] * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(scores), ops.pair_link(scores, TERMS["logistic"])[1] * 2)
