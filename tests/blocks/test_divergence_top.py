"""Divergences from a teacher of which some ids and their log-probs are known."""

import math

import pytest
import ragged
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.divergence import divergence_top as reference
from tokcredit import ops
from tokcredit.blocks import divergence as module

pytestmark = pytest.mark.usefixtures("device")

INF = math.inf
KINDS = [("forward_kl", None), ("reverse_kl", None), ("js", 0.5), ("js", 0.1), ("skew_forward", 0.1)]
KINDS += [("skew_reverse", 0.9)]
CASES = [(*kind, outside) for kind in KINDS for outside in ("bucket", "renormalised")]
CASES += [("forward_kl", None, "cut"), ("reverse_kl", None, "cut")]
EACH_CASE = pytest.mark.parametrize(("kind", "share", "outside"), CASES)

STUDENT, TEACHER = [1.0, 0, -1, 0.5], [0.2, 0.8, -0.5, 0]
FIRST, LIKELY = [0, 1], [0, 3]  # the teacher's most likely ids, and the student's
GOLDEN = [
    (FIRST, "bucket", "forward_kl", 0.2131816924, [0.232295198, -0.266026697, 0.006153486, 0.027578013]),
    (FIRST, "bucket", "reverse_kl", 0.1931442176, [0.22768838, -0.195232506, -0.00592078, -0.026535094]),
    (FIRST, "bucket", "js", 0.0493724201, [0.0543732, -0.053931205, -0.000080631, -0.000361364]),
    (FIRST, "renormalised", "forward_kl", 0.3088238270, [0.376714885, -0.376714885, 0, 0]),
    (FIRST, "renormalised", "reverse_kl", 0.2939199888, [0.314579093, -0.314579093, 0, 0]),
    (FIRST, "cut", "forward_kl", 0.2452409464, [0.081610585, -0.321460468, 0.043754741, 0.196095143]),
    (FIRST, "cut", "reverse_kl", 0.1576833099, [0.411169561, -0.127733552, -0.051705962, -0.231730047]),
    (LIKELY, "bucket", "forward_kl", 0.2420372705, [0.232295198, -0.235328867, -0.086572652, 0.089606321]),
    (LIKELY, "bucket", "reverse_kl", 0.2228648374, [0.213601079, -0.187816031, -0.069093657, 0.043308609]),
    (LIKELY, "renormalised", "forward_kl", 0.0109879156, [0.072625334, 0, 0, -0.072625334]),
    (LIKELY, "renormalised", "reverse_kl", 0.0107996846, [0.070501114, 0, 0, -0.070501114]),
]


def top(teacher, ids, outside="bucket", temperature=1.0):
    return module.Top(ids, (teacher / temperature).log_softmax(-1).gather(-1, ids.clamp(min=0)), outside)


def pair(rows, vocabulary, dtype=torch.float64, scale=2.0, seed=0):
    generator = ragged.generator(seed)
    made = [torch.randn(rows, vocabulary, dtype=torch.float64, generator=generator) * scale for _ in range(2)]
    return [x.to(dtype) for x in made]


def with_gradient(student, teacher, *arguments, grad=None, **settings):
    leaf = student.detach().clone().requires_grad_()
    values, entropies = module.with_entropies(leaf, teacher, *arguments, **settings)
    slopes = torch.ones_like(values) if grad is None else grad
    return values.detach(), entropies, torch.autograd.grad(values, leaf, slopes)[0]


@pytest.mark.parametrize(("ids", "outside", "kind", "value", "gradient"), GOLDEN)
def test_golden_vectors(ids, outside, kind, value, gradient):
    share = None if kind.endswith("kl") else 0.5
    for dtype, tolerance in ((torch.float64, 2e-9), (torch.float32, 1e-6)):
        teacher = top(torch.tensor([TEACHER], dtype=torch.float64), torch.tensor([ids]), outside)
        values, entropies, grad = with_gradient(torch.tensor([STUDENT], dtype=dtype), teacher, kind, share)
        assert values.tolist() == pytest.approx([value], abs=tolerance)
        assert grad[0].tolist() == pytest.approx(gradient, abs=tolerance)
        assert entropies.item() == pytest.approx(1.1929791180, abs=tolerance)


def test_golden_js_of_the_students_ids():
    teacher = top(torch.tensor([TEACHER], dtype=torch.float64), torch.tensor([LIKELY]))
    value = module.between(torch.tensor([STUDENT], dtype=torch.float64), teacher, "js", 0.5).item()
    assert value == pytest.approx(0.0567187674, abs=2e-9)


def test_golden_cut_below_zero():
    student = torch.tensor([[0.2, 0.8, -6, -6]], dtype=torch.float64)
    teacher = top(torch.tensor([TEACHER], dtype=torch.float64), torch.tensor([FIRST]), "cut")
    assert module.between(student, teacher, "forward_kl").item() == pytest.approx(-0.2599806422, abs=1e-9)


@given(st.integers(0, 4), st.integers(2, 12), st.sampled_from(CASES), st.sampled_from([1.0, 0.6]), st.integers(0, 99))
def test_matches_definition(rows, vocabulary, case, temperature, seed):
    kind, share, outside = case
    student, teacher = pair(rows, vocabulary, seed=seed)
    ids = torch.randint(-1, vocabulary, (rows, 5), generator=ragged.generator(seed))
    ids[:, 0] = torch.randint(0, vocabulary, (rows,), generator=ragged.generator(seed))
    mask = torch.arange(rows) % 3 != 1
    known = top(teacher, ids, outside, temperature)
    values, _, grad = with_gradient(student, known, kind, share, temperature, mask)
    expected, slopes = reference(student, ids, known.log_probs, kind, share, outside, temperature, mask)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, slopes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "share"), KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-6)])
def test_all_but_one_id_in_a_bucket_are_the_whole(kind, share, dtype, tolerance):
    student, teacher = pair(3, 300, dtype)
    ids = torch.randperm(300, generator=ragged.generator(1))[1:].expand(3, -1)
    seen = with_gradient(student, top(teacher, ids), kind, share)
    whole = with_gradient(student, teacher, kind, share)
    for ours, truth in zip(seen, whole, strict=True):
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


@EACH_CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(kind, share, outside, dtype):
    """Against float64, with ids in several blocks of the vocabulary and in a wide one."""
    student, teacher = pair(4, 3001, dtype)
    ids = teacher.float().topk(20).indices
    known = top(teacher.double(), ids, outside, 0.8)
    values, entropies, grad = with_gradient(student, known, kind, share, 0.8)
    exact = with_gradient(student.double(), known, kind, share, 0.8)
    torch.testing.assert_close(values.double(), exact[0], rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(entropies.double(), exact[1], rtol=3e-6, atol=3e-6)
    rtol, atol = {torch.float32: (1e-5, 2e-7), torch.bfloat16: (2**-8, 2e-7), torch.float16: (2**-10, 2**-24)}[dtype]
    torch.testing.assert_close(grad.double(), exact[2], rtol=rtol, atol=atol)
    assert values.dtype == torch.float32 and grad.dtype == dtype


@EACH_CASE
def test_gradcheck(kind, share, outside):
    student, teacher = pair(4, 19)
    mask = torch.tensor([True, True, False, True])
    known = top(teacher, teacher.topk(5).indices, outside)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module.between(x, known, kind, share, 0.7, mask), student)


@EACH_CASE
def test_a_step_along_the_gradient_lowers_it(kind, share, outside):
    student, teacher = pair(20, 50, torch.float32)
    known = top(teacher, teacher.topk(6).indices, outside)
    values, _, grad = with_gradient(student, known, kind, share)
    assert (module.between(student - 0.1 * grad, known, kind, share) < values).all()


@pytest.mark.parametrize(("kind", "share"), KINDS)
def test_a_bucket_never_exceeds_the_whole(kind, share):
    student, teacher = pair(30, 60)
    whole = module.between(student, teacher, kind, share)
    before = torch.zeros_like(whole)
    for k in (1, 5, 20, 50):
        part = module.between(student, top(teacher, teacher.topk(k).indices), kind, share)
        assert (part <= whole + 1e-12).all() and (part >= before - 1e-12).all()
        before = part


def test_a_tail_below_float32_keeps_its_digits():
    """What is outside of the ids is summed, not subtracted from 1."""
    student = torch.tensor([[20.0, 1.0, 0.0, -1.0]])
    known = top(torch.zeros(1, 4), torch.tensor([[0, 1]]))
    exact = with_gradient(student.double(), known, "forward_kl")
    for ours, truth in zip(with_gradient(student, known, "forward_kl"), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=0)


def test_all_ids_have_no_tail():
    student, teacher = pair(5, 6)
    everything = torch.arange(6).expand(5, -1)
    for kind, share in KINDS:
        seen = with_gradient(student, top(teacher, everything), kind, share)
        for ours, truth in zip(seen, with_gradient(student, teacher, kind, share), strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


def test_equal_ids_and_none():
    student, teacher = pair(2, 9)
    ids = torch.tensor([[3, 5, 3, -1, 5], [8, 8, -1, -1, 0]])
    known = top(teacher, ids)
    known.log_probs[:, 2:4] = known.log_probs[0, 4] = -40.0  # not the first: does not count
    seen = with_gradient(student, known, "js", 0.5)
    for row, alone in ((0, [3, 5]), (1, [8, 0])):
        expected = with_gradient(student[row : row + 1], top(teacher[row : row + 1], torch.tensor([alone])), "js", 0.5)
        for ours, truth in zip(seen, expected, strict=True):
            torch.testing.assert_close(ours[row : row + 1], truth)


@EACH_CASE
def test_what_the_mask_leaves_out_is_not_read(kind, share, outside):
    student, teacher = pair(6, 70, torch.float32)
    known = top(teacher, teacher.topk(4).indices, outside)
    expected = with_gradient(student, known, kind, share)
    mask = torch.tensor([True, False, True, True, False, True])
    student[~mask] = known.log_probs[~mask] = math.nan
    seen = with_gradient(student, known, kind, share, mask=mask)
    for ours, truth in zip(seen, expected, strict=True):
        assert torch.equal(ours[mask], truth[mask]) and not ours[~mask].any()
    student[0] = math.nan
    grad = with_gradient(student, known, kind, share, mask=mask, grad=1.0 * (torch.arange(6) > 0))[2]
    assert not grad[0].any() and grad[2].any()


def test_special_values():
    ids = torch.tensor([[0, 1]] * 2)
    good = [0.0, 1, 2]
    known = top(torch.tensor([good] * 2), ids)
    for kind, share, outside in CASES:
        for wrong in ([math.nan, 0, 0], [0, 0, math.nan], [INF, 0, 0], [-INF, -INF, -INF]):
            teacher = module.Top(ids, known.log_probs, outside)
            values, entropies, grad = with_gradient(torch.tensor([wrong, good]), teacher, kind, share)
            assert values.isnan().tolist() == entropies.isnan().tolist() == [True, False]
            assert grad.isnan().all(1).tolist() == [True, False]
    cut = torch.tensor([[-INF, 0.0, 0.0]])
    values, _, grad = with_gradient(cut, module.Top(ids[:1], known.log_probs[:1]), "forward_kl")
    assert values.item() == INF and grad.isnan().all()
    excluded = module.Top(ids[:1], torch.tensor([[-INF, -0.5]]))
    values, _, grad = with_gradient(torch.zeros(1, 3), excluded, "reverse_kl")
    assert values.item() == INF and grad.isnan().all()


def test_gradient_may_overwrite_the_logits():
    student, teacher = pair(5, 1100, torch.bfloat16)
    known = top(teacher.float(), teacher.float().topk(7).indices)
    expected = with_gradient(student, known, "js", 0.5)[2]
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    values = module.between(logits, known, "js", 0.5, overwrite=True)
    (grad,) = torch.autograd.grad(values.sum(), leaf, retain_graph=True)
    assert torch.equal(grad, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(values.sum(), leaf)


def test_arguments_are_checked(device):
    student, teacher = pair(3, 5)
    ids = torch.tensor([[0, 1]] * 3)
    known = top(teacher, ids)
    for made, kind, share, message in (
        (module.Top(ids, known.log_probs, "tail"), "forward_kl", None, "outside: expected one of bucket, renormalised"),
        (module.Top(ids, known.log_probs, "cut"), "js", 0.5, "outside: expected bucket or renormalised for js"),
        (
            module.Top(ids[:2], known.log_probs[:2]),
            "js",
            0.5,
            r"ids: expected int32 or int64 \[3, 2\], got int64 \[2, 2\]",
        ),
        (module.Top(ids, known.log_probs[:, :1]), "js", 0.5, r"log_probs: expected .* \[3, 2\], got float64 \[3, 1\]"),
        (module.Top(ids[:, :0], known.log_probs[:, :0]), "js", 0.5, "ids: expected 1 to 1024 for each position, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            module.between(student, made, kind, share)
    wrong = module.Top(torch.tensor([[0, 1], [5, 1], [0, 1]]), known.log_probs)
    if device == "cpu":
        with pytest.raises(ValueError, match="ids: expected -1 or an id below the vocabulary of 5, got 5 in row 1"):
            module.between(student, wrong, "forward_kl")
    else:
        assert module.between(student, wrong, "forward_kl").isnan().tolist() == [False, True, False]


def test_threads_do_not_change_a_bit():
    student, teacher = pair(40, 3001, torch.float32)
    known = top(teacher, teacher.topk(9).indices)
    before = ops.num_threads()
    try:
        ops.set_num_threads(1)
        one = with_gradient(student, known, "reverse_kl")
        ops.set_num_threads(3)
        three = with_gradient(student, known, "reverse_kl")
    finally:
        ops.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_registration(ids):
    student, teacher = pair(4, 20, torch.float32)
    known = top(teacher, teacher.topk(3).indices)
    names, mask = known.ids.to(ids), torch.arange(4) != 1
    forward = (student, names, known.log_probs, mask, 2, 0.5, 0, 0.8, 1)
    torch.library.opcheck(torch.ops.tokcredit.divergence_top, forward)
    kept = torch.ops.tokcredit.divergence_top(*forward)[2:]
    arguments = (names, mask, 0.8, *kept, torch.ones(4), 1)
    torch.library.opcheck(torch.ops.tokcredit.divergence_top_gradient, (student, *arguments))
    torch.library.opcheck(torch.ops.tokcredit.divergence_top_gradient_, (student.clone(), *arguments))


def test_compiles():
    student, teacher = pair(4, 20, torch.float32)
    known = top(teacher, teacher.topk(3).indices)

    def loss(x):
        return (module.between(x, known, "js", 0.3) * 2).sum()

    compiled, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    seen, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled), loss(plain)
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(torch.autograd.grad(seen, compiled), torch.autograd.grad(expected, plain))
