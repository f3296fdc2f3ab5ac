"""``divergence.between`` and ``with_entropies``: all kinds against their definition."""

import math

import pytest
import ragged
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.divergence import divergence as reference
from reference.divergence import mixed
from tokcredit import ops
from tokcredit.blocks import divergence as module

pytestmark = pytest.mark.usefixtures("device")

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [
    ("forward_kl", None),
    ("reverse_kl", None),
    ("js", 0.5),
    ("js", 0.1),
    ("js", 0.9),
    ("skew_forward", 0.1),
    ("skew_reverse", 0.9),
]
EACH_KIND = pytest.mark.parametrize(("kind", "share"), KINDS)
MIXED = KINDS[2:]


def pair(rows, vocabulary, dtype=torch.float64, scale=3.0, seed=0, apart=1.0):
    """Logits of a student, and of a teacher that differs from it by ``apart``."""
    generator = ragged.generator(seed)
    student, noise = (torch.randn(rows, vocabulary, dtype=torch.float64, generator=generator) for _ in range(2))
    return (scale * student).to(dtype), (scale * (student + apart * noise)).to(dtype)


def with_gradient(student, teacher, *arguments, grad=None, **settings):
    leaf = student.detach().clone().requires_grad_()
    values, entropies = module.with_entropies(leaf, teacher, *arguments, **settings)
    slopes = torch.ones_like(values) if grad is None else grad
    return values.detach(), entropies, torch.autograd.grad(values, leaf, slopes)[0]


STUDENT, TEACHER = [1.0, 0, -1, 0.5], [0.2, 0.8, -0.5, 0]
GOLDEN = [
    ("forward_kl", None, 1, 0.2465227256, [0.232295198, -0.266026697, -0.055874821, 0.089606321]),
    ("reverse_kl", None, 1, 0.2248753615, [0.212648109, -0.200765513, -0.054613199, 0.042730603]),
    ("js", 0.5, 1, 0.0574122892, [0.052422532, -0.054648816, -0.013516613, 0.015742896]),
    ("js", 0.1, 1, 0.0217625151, [0.020239579, -0.022723072, -0.004983616, 0.007467109]),
    ("js", 0.9, 1, 0.0202531969, [0.018920382, -0.018252381, -0.004884127, 0.004216127]),
    ("skew_forward", 0.1, 1, 0.1923785524, [0.176914341, -0.194662516, -0.044466395, 0.06221457]),
    ("skew_reverse", 0.9, 1, 0.1825687206, [0.168723008, -0.166208544, -0.043731928, 0.041217463]),
    ("forward_kl", None, 2, 0.0593864015, [0.055323879, -0.060313529, -0.02218044, 0.02717009]),
    ("reverse_kl", None, 2, 0.0577987901, [0.055484657, -0.054466608, -0.023014293, 0.021996244]),
    ("js", 0.5, 2, 0.0145607074, [0.013665405, -0.014140128, -0.00562309, 0.006097813]),
]
WITHOUT_TEACHERS = [
    ("forward_kl", None, 0.3225567371, [0.199329676, -0.326093795, 0.064147685, 0.062616434]),
    ("js", 0.5, 0.0786700593, [0.038314439, -0.064040469, 0.019845809, 0.005880221]),
    ("skew_forward", 0.1, 0.2535101133, [0.142188908, -0.232217776, 0.054166016, 0.035862852]),
    ("skew_reverse", 0.9, 0.2637567610, [0.110726552, -0.192738216, 0.078356189, 0.003655475]),
]
WITHOUT_STUDENTS = [
    ("reverse_kl", None, 0.3495296026, [0.197667507, -0.225400145, 0, 0.027732638]),
    ("js", 0.5, 0.0980076793, [0.047156619, -0.059311649, 0, 0.01215503]),
]


def matrix(values, dtype=torch.float64):
    return torch.tensor([values], dtype=dtype)


def check(student, teacher, kind, share, temperature, value, gradient):
    for dtype, tolerance in ((torch.float64, 2e-9), (torch.float32, 1e-6)):
        x, y = matrix(student, dtype), matrix(teacher, dtype)
        values, _, grad = with_gradient(x, y, kind, share, temperature)
        assert values.tolist() == pytest.approx([value], abs=tolerance)
        assert grad[0].tolist() == pytest.approx(gradient, abs=tolerance)


@pytest.mark.parametrize(("kind", "share", "temperature", "value", "gradient"), GOLDEN)
def test_golden_vectors(kind, share, temperature, value, gradient):
    check(STUDENT, TEACHER, kind, share, temperature, value, gradient)


@pytest.mark.parametrize(("kind", "share", "value", "gradient"), WITHOUT_TEACHERS)
def test_a_token_that_the_teacher_excludes(kind, share, value, gradient):
    check(STUDENT, [0.2, 0.8, -INF, 0], kind, share, 1, value, gradient)


@pytest.mark.parametrize(("kind", "share", "value", "gradient"), WITHOUT_STUDENTS)
def test_a_token_that_the_student_excludes(kind, share, value, gradient):
    check([1.0, 0, -INF, 0.5], TEACHER, kind, share, 1, value, gradient)


@EACH_KIND
@pytest.mark.parametrize("of", ["teacher", "student", "both"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_excluded_tokens(kind, share, of, dtype, tolerance):
    """A KL is infinite where its second distribution excludes what its first does not; nothing else is."""
    student, teacher = pair(3, 40, dtype)
    places = [0, 17, 39]
    for row, place in enumerate(places):
        for name, x in (("student", student), ("teacher", teacher)):
            if of in (name, "both"):
                x[row, place] = -INF
    seen = with_gradient(student, teacher, kind, share)
    infinite = (kind, of) in (("forward_kl", "student"), ("reverse_kl", "teacher"))
    assert seen[0].isinf().all() if infinite else seen[0].isfinite().all()
    assert seen[2].isnan().all() if infinite else seen[2].isfinite().all()
    if of != "teacher" and not infinite:
        assert not seen[2][range(3), places].any()
    for ours, truth in zip(seen, reference(student, teacher, kind, share), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_golden_entropy():
    _, entropies = module.with_entropies(matrix(STUDENT), matrix(TEACHER), "forward_kl")
    assert entropies.item() == pytest.approx(1.1929791180, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_infinite_rows(dtype):
    """They are inf with a gradient of NaN, and the rows beside them are not touched."""
    whole, cut = [0.0, 1, -1, 0.5], [0.0, 1, -INF, 0.5]
    for kind, student, teacher in (("forward_kl", cut, whole), ("reverse_kl", whole, cut)):
        x, y = torch.tensor([student, whole], dtype=dtype), torch.tensor([teacher, whole], dtype=dtype)
        values, entropies, grad = with_gradient(x, y, kind)
        assert values.tolist() == [INF, pytest.approx(0, abs=1e-7)]
        assert entropies.isfinite().all()
        assert grad[0].isnan().all() and grad[1].isfinite().all()
        grad = with_gradient(x, y, kind, grad=torch.tensor([0, 1], dtype=values.dtype))[2]
        assert not grad[0].any()


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_that_both_exclude_is_as_if_it_were_not_there(kind, share, dtype):
    x, y = pair(4, 40, dtype)
    x[:, 7] = y[:, 7] = -INF
    left = torch.arange(40) != 7
    values, entropies, grad = with_gradient(x, y, kind, share)
    expected = with_gradient(x[:, left], y[:, left], kind, share)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(values, expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(entropies, expected[1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad[:, left], expected[2], rtol=tolerance, atol=tolerance)
    assert not grad[:, 7].any()


def test_special_values_are_not_hidden():
    """A NaN, an infinite logit, and a row of -inf, of either model."""
    for kind, share in KINDS:
        for wrong in ([math.nan, 0, 0], [INF, 0, 0], [-INF, -INF, -INF]):
            x = torch.tensor([wrong, [0.0, 1, 2]])
            for student, teacher in ((x, torch.zeros(2, 3)), (torch.zeros(2, 3), x)):
                values, _, grad = with_gradient(student, teacher, kind, share)
                assert values.isnan().tolist() == [True, False], (kind, wrong)
                assert grad.isnan().all(1).tolist() == [True, False]


@given(
    st.integers(0, 5),
    st.integers(1, 40),
    st.sampled_from(KINDS),
    st.sampled_from([1.0, 0.6, 2.5]),
    st.sampled_from([0.0, 1e-3, 1.0]),
    st.integers(0, 99),
)
def test_matches_definition(rows, vocabulary, kind, temperature, apart, seed):
    student, teacher = pair(rows, vocabulary, seed=seed, apart=apart)
    mask = torch.arange(rows) % 3 != 1
    values, entropies, grad = with_gradient(student, teacher, *kind, temperature, mask)
    expected = reference(student, teacher, *kind, temperature, mask)
    for ours, truth in zip((values, entropies, grad), expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-13)


@EACH_KIND
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 1023, 1024, 1025, 5003])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "step"),
    [
        (torch.float64, 1e-11, 1e-11),
        (torch.float32, 2e-6, 1e-5),
        (torch.bfloat16, 2e-6, 2**-8),
        (torch.float16, 2e-6, 2**-10),
    ],
)
def test_dtypes_and_sizes(kind, share, vocabulary, dtype, tolerance, step):
    student, teacher = pair(2, vocabulary, dtype)
    values, entropies, grad = with_gradient(student, teacher, kind, share, 0.8)
    expected = reference(student, teacher, kind, share, 0.8)
    assert values.dtype == entropies.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    torch.testing.assert_close(values.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(entropies.double(), expected[1], rtol=tolerance, atol=tolerance)
    atol = {torch.float64: 1e-15, torch.float16: 2**-24}.get(dtype, 2e-7)
    torch.testing.assert_close(grad.double(), expected[2], rtol=step, atol=atol)


@pytest.mark.parametrize("kind", ["js", "skew_forward", "skew_reverse"])
@pytest.mark.parametrize("share", [0.01, 1 / 16, 0.3, 15 / 16, 0.99])
@pytest.mark.parametrize("apart", [0.1, 1.0, 6.0])
def test_shares_and_distances_in_float32(kind, share, apart):
    """Logs of probabilities that differ by 50 and more, and shares on both sides of where logs take fewer steps."""
    student, teacher = pair(2, 1100, torch.float32, apart=apart)
    student[0, 3] = teacher[1, 1050] = -INF
    values, _, grad = with_gradient(student, teacher, kind, share)
    exact, _, slope = reference(student, teacher, kind, share)
    torch.testing.assert_close(values.double(), exact, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-5, atol=2e-7)


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_huge_logits(kind, share, dtype, offset):
    student, teacher = pair(4, 300, dtype)
    student = student + offset
    values, entropies, grad = with_gradient(student, teacher, kind, share, 0.7)
    expected = reference(student, teacher, kind, share, 0.7)
    tolerance = 1e-10 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(values.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(entropies.double(), expected[1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double(), expected[2], rtol=10 * tolerance, atol=tolerance)


@EACH_KIND
def test_close_distributions_keep_their_digits(kind, share):
    """A divergence of 1e-7 is a difference of numbers near 10. That of a KL has the error of a logsumexp in float32."""
    student, teacher = pair(8, 3000, torch.float32, apart=3e-4)
    values, _, grad = with_gradient(student, teacher, kind, share)
    exact, _, slope = reference(student, teacher, kind, share)
    assert exact.max() < 1e-5
    torch.testing.assert_close(values.double(), exact, rtol=2e-3, atol=1e-7 if kind.endswith("kl") else 1e-10)
    error = (grad.double() - slope).norm(dim=1) / slope.norm(dim=1)
    assert error.max() < 1e-3


@EACH_KIND
def test_confident_rows_keep_their_digits(kind, share):
    """Probabilities within 1e-6 of 1, of the student, of the teacher and of both."""
    quiet = torch.randn(4, 50, generator=ragged.generator(0))
    student, teacher = quiet.clone(), quiet.flip(0).clone()
    student[:3, 20] += 17
    teacher[1, 20] += 18
    teacher[2:, 9] += 17
    values, _, grad = with_gradient(student, teacher, kind, share)
    exact, _, slope = reference(student, teacher, kind, share)
    torch.testing.assert_close(values.double(), exact, rtol=2e-5, atol=0)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-4, atol=1e-12)


@EACH_KIND
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck(kind, share, temperature):
    student, teacher = pair(4, 19, scale=1.5)
    mask = torch.tensor([True, True, False, True])
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module.between(x, teacher, kind, share, temperature, mask), student)


@EACH_KIND
def test_a_step_along_the_gradient_lowers_it(kind, share):
    student, teacher = pair(20, 50, torch.float32)
    values, _, grad = with_gradient(student, teacher, kind, share)
    assert (module.between(student - 0.1 * grad, teacher, kind, share) < values).all()


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_js_is_symmetric_and_bounded(share):
    student, teacher = pair(20, 50)
    there, back = module.between(student, teacher, "js", share), module.between(teacher, student, "js", 1 - share)
    torch.testing.assert_close(there, back)
    most = -share * math.log(share) - (1 - share) * math.log(1 - share)
    apart = module.between(matrix([9.0, -INF]), matrix([-INF, 3.0]), "js", share)
    assert apart.item() == pytest.approx(most)
    assert (there > 0).all() and (there < most).all()


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_same_model_has_none(kind, share, dtype):
    student, _ = pair(20, 500, dtype, 8.0)
    values, _, grad = with_gradient(student, student, kind, share)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-7
    assert values.abs().max() < tolerance and grad.abs().max() < tolerance


def test_limits_of_js_are_the_kls():
    student, teacher = pair(20, 50)
    for share, kind, by in ((1e-7, "forward_kl", 1e-7), (1 - 1e-7, "reverse_kl", 1e-7)):
        scaled = module.between(student, teacher, "js", share) / by
        torch.testing.assert_close(scaled, module.between(student, teacher, kind), rtol=1e-3, atol=1e-5)


@EACH_KIND
def test_what_the_mask_leaves_out_is_not_read(kind, share):
    student, teacher = pair(6, 70, torch.float32)
    expected = with_gradient(student, teacher, kind, share)
    mask = torch.tensor([True, False, True, True, False, True])
    for x in (student, teacher):
        x[~mask] = math.nan
    seen = with_gradient(student, teacher, kind, share, mask=mask)
    for ours, truth in zip(seen, expected, strict=True):
        assert torch.equal(ours[mask], truth[mask]) and not ours[~mask].any()


@EACH_KIND
def test_a_row_without_incoming_gradient_is_not_read(kind, share):
    student, teacher = pair(3, 30)
    student[1] = math.nan
    grad = with_gradient(student, teacher, kind, share, grad=torch.tensor([1.0, 0, 2], dtype=torch.float64))[2]
    assert grad.isfinite().all() and not grad[1].any() and grad[0].any()


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_gradient_may_overwrite_the_logits(kind, share, dtype):
    student, teacher = pair(5, 1100, dtype)
    expected = with_gradient(student, teacher, kind, share)[2]
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    places = []
    logits.register_hook(lambda grad: places.append(grad.data_ptr()))
    values = module.between(logits, teacher, kind, share, overwrite=True)
    (grad,) = torch.autograd.grad(values.sum(), leaf, retain_graph=True)
    assert places == [logits.data_ptr()]
    assert torch.equal(grad, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(values.sum(), leaf)


@EACH_KIND
def test_mixture_of_two_teachers(kind, share):
    student, first = pair(5, 300)
    other = pair(5, 300, seed=3)[0]
    weights = torch.tensor([0.75, -0.05, 0.0, 3.0, 1.0], dtype=torch.float64)
    first[1, 4] = first[0, 5] = other[0, 5] = -INF
    other[2] = math.nan
    if kind == "reverse_kl":
        student[1, 4] = student[0, 5] = -INF
    teacher = torch.tensor(
        [mixed(a, b, w) for a, b, w in zip(first.tolist(), other.tolist(), weights.tolist(), strict=True)],
        dtype=torch.float64,
    )
    seen = with_gradient(student, module.Mixture(first, other, weights), kind, share, 0.8)
    for ours, truth in zip(seen, reference(student, teacher, kind, share, 0.8), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


def test_golden_mixture():
    teacher = module.Mixture(matrix(TEACHER), matrix([0, 0.5, 0, 0.3]), torch.tensor([0.75]))
    for kind, value, gradient in (
        ("reverse_kl", 0.2735879194, [0.151783695, -0.236234141, -0.029172767, 0.113623213]),
        ("forward_kl", 0.3158111698, [0.212244696, -0.339706582, -0.012742262, 0.140204148]),
    ):
        values, _, grad = with_gradient(matrix(STUDENT), teacher, kind)
        assert values.tolist() == pytest.approx([value], abs=2e-9)
        assert grad[0].tolist() == pytest.approx(gradient, abs=2e-9)


def test_arguments_are_checked():
    student, teacher = pair(3, 5)
    for kind, share, message in (
        ("js", None, "share: expected a number for js, got None"),
        ("js", 0.0, "share: expected more than 0 and less than 1, got 0.0"),
        ("js", 1.0, "share: expected more than 0 and less than 1, got 1.0"),
        ("reverse_kl", 0.5, "share: expected None for reverse_kl, got 0.5"),
        ("k3", None, "kind: expected one of forward_kl, reverse_kl, js, skew_forward, skew_reverse, got 'k3'"),
    ):
        with pytest.raises(ValueError, match=message):
            module.between(student, teacher, kind, share)
    with pytest.raises(ValueError, match=r"teacher: expected the shape of student, \[3, 5\], got \[3, 4\]"):
        module.between(student, teacher[:, :4], "forward_kl")
    with pytest.raises(ValueError, match="temperature: expected a positive number, got nan"):
        module.between(student, teacher, "forward_kl", temperature=math.nan)
    with pytest.raises(ValueError, match=r"mask: expected bool \[3\], got bool \[2\]"):
        module.between(student, teacher, "forward_kl", mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"weights: expected .* \[3\], got float32 \[2\]"):
        module.between(student, module.Mixture(teacher, teacher, torch.ones(2)), "forward_kl")
    with pytest.raises(TypeError, match="teacher: expected a float tensor, got int64"):
        module.between(student, teacher.long(), "forward_kl")


def test_shapes_and_dtypes():
    student, teacher = pair(6, 9)
    assert module.between(student.view(2, 3, 9), teacher.view(2, 3, 9), "js", 0.5).shape == (2, 3)
    assert module.between(student[:0], teacher[:0], "js", 0.5).shape == (0,)
    half = with_gradient(student.bfloat16(), teacher.float(), "forward_kl")
    whole = with_gradient(student.bfloat16().float(), teacher.float(), "forward_kl")
    assert half[2].dtype == torch.bfloat16 and torch.equal(half[0], whole[0])
    strided = with_gradient(student.t().contiguous().t(), teacher.t().contiguous().t(), "reverse_kl")
    assert torch.equal(strided[2], with_gradient(student, teacher, "reverse_kl")[2])


def test_no_gradient_to_the_teacher():
    student, teacher = pair(3, 5)
    teacher.requires_grad_()
    assert not module.between(student, teacher, "js", 0.5).requires_grad
    student.requires_grad_()
    module.between(student, teacher, "js", 0.5).sum().backward()
    assert teacher.grad is None


def test_second_derivative_is_refused():
    student, teacher = pair(3, 5)
    student.requires_grad_()
    values = module.between(student, teacher, "js", 0.5)
    (grad,) = torch.autograd.grad(values.square().sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@EACH_KIND
def test_threads_do_not_change_a_bit(kind, share):
    student, teacher = pair(40, 3001, torch.float32)
    before = ops.num_threads()
    try:
        ops.set_num_threads(1)
        one = with_gradient(student, teacher, kind, share)
        ops.set_num_threads(3)
        three = with_gradient(student, teacher, kind, share)
    finally:
        ops.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def rows_of(teacher, kind=0, other=None, weights=None, mask=None):
    return (teacher, other, weights, mask, kind, 0.5, 0.8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype):
    student, teacher = pair(4, 20, dtype)
    mask = torch.arange(4) != 1
    for arguments in (rows_of(teacher), rows_of(teacher, 2, teacher, torch.ones(4), mask)):
        torch.library.opcheck(torch.ops.tokcredit.divergence, (student, *arguments, 1))
        saved = torch.ops.tokcredit.divergence(student, *arguments, 1)[2]
        both = (*arguments, saved, torch.ones(4), 1)
        torch.library.opcheck(torch.ops.tokcredit.divergence_gradient, (student, *both))
        torch.library.opcheck(torch.ops.tokcredit.divergence_gradient_, (student.clone(), *both))


def test_compiles():
    student, teacher = pair(4, 20, torch.float32)

    def loss(x):
        return (module.between(x, teacher, "js", 0.3) * 2).sum()

    leaf = student.clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True)(leaf)
    (grad,) = torch.autograd.grad(compiled, leaf)
    again = student.clone().requires_grad_()
    plain = loss(again)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(grad, torch.autograd.grad(plain, again)[0])
