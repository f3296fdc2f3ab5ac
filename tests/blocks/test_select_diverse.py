import math

import pytest
import ragged
import reference.diverse as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokcredit import Spans, ops
from tokcredit.blocks import select

pytestmark = pytest.mark.usefixtures("device")


def check(order, score, vectors, spans, k, weight):
    """Every choice is worth as much as any other candidate at that step, up to float32."""
    order = order.cpu()
    seen = torch.full_like(order, -1)
    for r, (begin, end) in enumerate(zip(spans.begin.tolist(), spans.end.tolist(), strict=True)):
        tokens = [t for t in range(begin, end) if spans.mask is None or bool(spans.mask[t])]
        wanted = k[r] if isinstance(k, torch.Tensor) else k
        steps = {int(order[t]): i for i, t in enumerate(tokens) if order[t] >= 0}
        assert sorted(steps) == list(range(min(max(int(wanted), 0), len(tokens))))
        scores = reference.scaled([score[t].item() for t in tokens], weight)
        rows = [vectors[t].double().tolist() for t in tokens]
        chosen = []
        for step in range(len(steps)):
            worth = reference.worths(scores, rows, chosen, weight)
            best = max(worth.values())
            picked = steps[step]
            assert worth[picked] == best or worth[picked] >= best - 2e-6
            chosen.append(picked)
        seen[tokens] = order[tokens]
    assert torch.equal(seen, order)  # -1 elsewhere


@given(
    ragged.spans(),
    st.integers(-1, 7),
    st.sampled_from([0.0, 0.3, 1.0, None]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 40),
)
def test_each_choice_is_the_best(spans, k, weight, dtype, width):
    score = ragged.values(spans.size)
    vectors = ragged.values(spans.size * width, dtype, seed=1).reshape(spans.size, width)
    if spans.size > 4:
        score[1], score[3], vectors[2] = math.nan, math.inf, math.nan
    check(select.diverse(score, vectors, k, spans, weight), score, vectors, spans, k, weight)


def test_number_per_row_and_share():
    spans = ragged.packed(5, 0, 4, mask=torch.arange(9) != 2)
    score, vectors = ragged.values(9), ragged.values(27, seed=3).reshape(9, 3)
    number = torch.tensor([2, 3, 9])
    check(select.diverse(score, vectors, number, spans), score, vectors, spans, number, 0.5)
    half = select.diverse(score, vectors, select.Share(0.5), spans)
    assert torch.equal(half, select.diverse(score, vectors, torch.tensor([2, 0, 2]), spans))
    assert select.diverse(score[:0], vectors[:0], 3, ragged.packed(0, 0)).shape == (0,)


X = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.7, 0.7]]


def test_golden_vectors():
    one, x = Spans.single(4), torch.tensor(X)
    assert select.diverse(torch.tensor([0.9, 0.8, 0.3, 0.5]), x, 3, one).tolist() == [0, 2, 1, -1]
    assert select.diverse(torch.tensor([0.2, 0.9, 0.5, 0.6]), x, 3, one, None).tolist() == [-1, 0, 1, 2]


def test_weight_one_takes_the_largest_scores_and_ties_go_to_the_lower_index():
    spans = ragged.packed(6, 3)
    score, vectors = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0, 2.0, 5.0, 5.0, 5.0]), ragged.values(18).reshape(9, 2)
    for k in (1, 3, 9):
        order = select.diverse(score, vectors, k, spans, 1.0)
        assert torch.equal(order >= 0, select.top_k(score, k, spans))
    assert order.tolist() == [4, 0, 2, 1, 5, 3, 0, 1, 2]


def test_equal_scores_give_the_farthest_point():
    """With the product equal scores count as 1; with a weight as 0. Both then take what is least similar."""
    x, same = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [0.0, 1.0]]), torch.full((4,), 7.0)
    for weight in (0.0, 0.5, None):
        assert select.diverse(same, x, 3, Spans.single(4), weight).tolist() == [0, -1, 1, 2]


def test_duplicates_come_last():
    x = torch.tensor(X)[[0, 0, 2]]
    assert select.diverse(torch.tensor([0.5, 0.5, 0.4]), x, 3, Spans.single(3), 0.4).tolist() == [0, 2, 1]


def test_zeros_at_the_end_of_vectors_do_not_matter():
    spans = ragged.packed(30, 50)
    score, vectors = ragged.values(80), ragged.values(80 * 8, torch.float32).reshape(-1, 8)
    wide = torch.nn.functional.pad(vectors, (0, 90))
    assert torch.equal(select.diverse(score, wide, 5, spans), select.diverse(score, vectors, 5, spans))


def test_registration_and_compilation():
    spans = ragged.packed(5, 4)
    score, vectors = ragged.values(9), ragged.values(27, torch.float32).reshape(9, 3)
    operands = (vectors, score.float(), *spans.arrays, torch.tensor([2, 3]), 3, 0.5, False, 1)
    torch.library.opcheck(torch.ops.tokcredit.diverse.default, operands)
    compiled = torch.compile(lambda s, v: ops.diverse(v, s, *operands[2:]), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(score.float(), vectors), ops.diverse(*operands))


def test_refusals():
    one, score, x = Spans.single(4), torch.ones(4), torch.tensor(X)
    for wrong, message in (
        ({"vectors": x[0]}, "vectors: expected"),
        ({"vectors": x[:3]}, "vectors: expected"),
        ({"vectors": x.long()}, "vectors: expected a float tensor"),
        ({"score": score[:3]}, "score: expected"),
        ({"weight": 1.5}, "weight: expected"),
        ({"weight": math.nan}, "weight: expected"),
        ({"k": 1.5}, "k: expected integers"),
        ({"k": torch.tensor([1, 2])}, "k: expected one number"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            select.diverse(**{"score": score, "vectors": x, "k": 2, "spans": one, **wrong})


def test_sensitivity():
    w = torch.tensor([[1.0, 0.5], [-0.5, 1.0]], dtype=torch.float64)
    x = torch.tensor([[0.2, -0.1], [1.0, 0.4]], dtype=torch.float64)
    directions = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    found = select.sensitivity(lambda v: torch.tanh(v @ w.T), x, directions)
    torch.testing.assert_close(found, torch.tensor([1.0894933969, 0.5814617614], dtype=torch.float64))
    # Of a linear projection it is the same for all tokens, and its square is |W|^2 / d on average.
    linear = select.sensitivity(lambda v: v @ w.T, x, 2000, generator=ragged.generator(0))
    torch.testing.assert_close(linear[0], linear[1])
    assert linear[0].item() == pytest.approx((w.square().sum() / 2).sqrt().item(), rel=0.05)
    half = select.sensitivity(lambda v: v * v, x.bfloat16(), directions)
    assert half.dtype == torch.float32
    for wrong in ({"x": x[0]}, {"step": 0.0}, {"directions": 0}, {"directions": directions[:, :1]}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            select.sensitivity(**{"project": torch.tanh, "x": x, "directions": directions, **wrong})
