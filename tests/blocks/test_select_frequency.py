import functools
import math

import pytest
import ragged
import torch
from tokcredit.blocks.select import frequency

f64 = functools.partial(torch.tensor, dtype=torch.float64)

pytestmark = pytest.mark.usefixtures("device")


def golden():
    q = f64([[1, -0.5, 0.3, 2]])
    k = [[0.2, 0.1, 0.5, 1], [1, 0, -0.4, 0.3], [-0.5, 0.8, 1.2, 0.9], [0.7, -1, 0.2, -0.6], [0.4, 0.4, -0.9, 1.5]]
    return q, f64([k]), f64([[1, 0], [0, 1], [1, 1], [-1, 0], [0.5, -0.5]])


def test_golden_vectors():
    q, k, v = golden()
    first, second = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    for layout, partial, agreement in (
        ("half", ([0.35, 0.88, -0.14, 0.76, 0.13], [1.95, 0.6, 1.4, -0.7, 2.8]), [0, 1]),
        ("adjacent", ([0.15, 1, -0.9, 1.2, 0.2], [2.15, 0.48, 2.16, -1.14, 2.73]), [0, 0.5]),
    ):
        for chunks, expected in zip((first, second), partial, strict=True):
            found = frequency.scores(q, k, chunks, layout)
            torch.testing.assert_close(found, f64([expected]), rtol=0, atol=1e-7)
        assert frequency.agreement(q, k, 2, layout).tolist() == [agreement]
        kept = frequency.keys(frequency.scores(q, k, second, layout), 3)
        assert kept.tolist() == [[True, False, True, False, True]]
    full = f64([[2.3, 1.48, 1.26, 0.06, 2.93]])
    torch.testing.assert_close(frequency.scores(q, k, first | second), full, rtol=0, atol=1e-7)
    for mask, weights, output in (
        (kept, [0.337293171, 0.200527721, 0.462179108], [0.768910446, -0.030561833]),
        (frequency.keys(full, 5), None, [0.493935195, 0.144900930]),
    ):
        attention = (full / 2).masked_fill(~mask, -math.inf).softmax(-1)
        torch.testing.assert_close((attention @ v)[0], f64(output), rtol=0, atol=1e-7)
        if weights:
            torch.testing.assert_close(attention[mask], f64(weights), rtol=0, atol=1e-7)


def test_which_chunks_are_dominant():
    means = torch.tensor([[0.1, 0.6, 0.3, 0.9, 0.2]])
    for arguments, expected in (((0.8, 1, 2), [3]), ((0.8, 3, 3), [1, 2, 3]), ((0.4, 1, 2), [1, 3])):
        assert frequency.dominant(means, *arguments)[0].nonzero()[:, 0].tolist() == expected
    assert frequency.dominant(means).all()  # fewer than 16
    assert frequency.dominant(torch.ones(2, 5), 0.5, 2, 2).tolist() == [[True, True, False, False, False]] * 2


def test_all_chunks_and_the_whole_budget_are_full_attention():
    generator = ragged.generator(0)
    q, k = torch.randn(3, 8, generator=generator), torch.randn(3, 11, 8, generator=generator)
    every = torch.ones(3, 4, dtype=torch.bool)
    for layout in ("half", "adjacent"):
        found = frequency.scores(q, k, every, layout)
        torch.testing.assert_close(found, torch.einsum("hd,htd->ht", q, k))
        assert frequency.keys(found, 11).all() and frequency.keys(found, 99).all()
        for h in range(3):  # a head by loops, over the first six coordinates
            pairs = [(j, j + 3) if layout == "half" else (2 * j, 2 * j + 1) for j in range(3)]
            alone = [[sum(q[h, x] * k[h, t, x] for x in pair) for t in range(11)] for pair in pairs]
            best = set((k[h] @ q[h]).topk(4).indices.tolist())
            expected = [len(best & set(torch.stack(row).topk(4).indices.tolist())) / 4 for row in alone]
            assert frequency.agreement(q, k, 4, layout, rotated=6)[h].tolist() == pytest.approx(expected)
    assert frequency.agreement(q, k, 99).tolist() == [[1.0] * 4] * 3
    assert frequency.keys(torch.tensor([[1.0, math.nan, 1.0, -math.inf]]), 2).tolist() == [[True, False, True, False]]
    half = frequency.scores(q.bfloat16(), k.bfloat16(), every)
    assert half.dtype == torch.float32


def test_refusals():
    q, k, _ = golden()
    chunks = torch.tensor([[True, False]])
    for call, wrong in (
        (frequency.agreement, {"query": q[0]}),
        (frequency.agreement, {"keys": k[..., :3]}),
        (frequency.agreement, {"k": 0}),
        (frequency.agreement, {"layout": "third"}),
        (frequency.agreement, {"rotated": 3}),
        (frequency.agreement, {"rotated": 6}),
        (frequency.scores, {"chunks": chunks[:, :1]}),
        (frequency.scores, {"chunks": chunks.float()}),
        (frequency.dominant, {"agreement": q[0]}),
        (frequency.dominant, {"threshold": 1.5}),
        (frequency.dominant, {"least": 17}),
        (frequency.keys, {"scores": k}),
        (frequency.keys, {"budget": -1}),
    ):
        well = {
            frequency.agreement: {"query": q, "keys": k, "k": 2},
            frequency.scores: {"query": q, "keys": k, "chunks": chunks},
            frequency.dominant: {"agreement": q},
            frequency.keys: {"scores": q, "budget": 2},
        }[call]
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(wrong))}: expected"):
            call(**{**well, **wrong})
