import math
from dataclasses import dataclass

import naive
import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize(("beta", "margin", "smoothing"), [(0.1, 0.0, 0.0), (2.0, 0.5, 0.0), (1.0, 0.3, 0.1)])
def test_logistic(beta, margin, smoothing):
    chosen, rejected = torch.tensor([2.0, -1.0, 0.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    ours = tc.link.logistic(beta, margin, smoothing)(chosen, rejected)
    for c, r, got in zip(chosen.tolist(), rejected.tolist(), ours.tolist(), strict=True):
        z = beta * (c - r) - margin
        expected = (1 - smoothing) * math.log1p(math.exp(-z)) + smoothing * math.log1p(math.exp(z))
        assert got == pytest.approx(expected)


def test_a_better_score_of_the_chosen_row_lowers_the_loss():
    chosen = torch.tensor([0.5], requires_grad=True)
    rejected = torch.tensor([0.25], requires_grad=True)
    tc.link.logistic(1.0)(chosen, rejected).sum().backward()
    assert chosen.grad.item() == pytest.approx(-1 / (1 + math.exp(0.25))) and rejected.grad == -chosen.grad


def test_large_scores_do_not_overflow():
    loss = tc.link.logistic(1.0)(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]))
    assert loss.tolist() == [2e4, 0.0]


@pytest.mark.parametrize(
    ("link", "value", "chosen", "rejected"),
    [
        (tc.link.logistic(label_smoothing=0.1), 0.6657595555, -0.038250714, 0.038250714),
        (tc.link.robust(label_smoothing=0.1), 0.6500095555, -0.060750714, 0.060750714),
        (tc.link.squared(), 18.49, -8.6, 8.6),
        (tc.link.hinge(), 0.93, -0.1, 0.1),
        (tc.link.exo_pair(label_smoothing=0.1), 0.4730020120, -0.053115521, 0.053115521),
        (tc.link.nca_pair(), 1.3690380773, -0.024625003, 0.024250225),
        (tc.link.bco_pair(), 1.3517567936, -0.049750002, 0.04850045),
        (tc.link.sppo_hard(), 43.37, -9.8, 8.8),
        (tc.link.apo_zero(), 0.9825045192, -0.024999375, 0.024977513),
        (tc.link.apo_down(), 0.9850071215, 0.000029975, 0.0249694),
        (tc.link.discopop(), 0.8782645538, 0.002503352, -0.002503352),
    ],
)
def test_golden_vectors(link, value, chosen, rejected):
    """Scores 0.1 and -0.6; values of TRL and of the official code."""
    scores = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (0.1, -0.6)]
    loss = link(*scores).sum()
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=6e-11)
    assert [x.grad.item() for x in scores] == pytest.approx([chosen, rejected], abs=6e-10)


@pytest.mark.parametrize("name", ["robust", "hinge", "exo_pair", "nca_pair", "bco_pair", "apo_zero", "discopop"])
def test_links_of_large_and_undefined_scores(name):
    """Nothing overflows to NaN, and a NaN stays one."""
    link = getattr(tc.link, name)()
    scores = torch.tensor([[300.0, -300.0, math.nan], [-300.0, 300.0, 0.0]], dtype=torch.float64)
    loss = link(*scores)
    assert loss[:2].isfinite().all() and loss[2].isnan()
    assert loss[0] < loss[1]


def test_both():
    """The weighted sum of two links; one with weight 0 does not count, even if it is not finite."""
    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([0.1, 2.0], [-0.6, 1.0]))
    link = tc.link.both(tc.link.hinge(), tc.link.logistic(0.3), 0.8, 0.3)
    loss = link(chosen, rejected)
    expected = 0.8 * tc.link.hinge()(chosen, rejected) + 0.3 * tc.link.logistic(0.3)(chosen, rejected)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(
        *(torch.autograd.grad(x.sum(), (chosen, rejected)) for x in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    far = torch.tensor([-1e200], dtype=torch.float64)
    assert tc.link.squared()(far, -far).isinf()
    assert tc.link.both(tc.link.squared(), tc.link.hinge(), 0.0, 1.0)(far, -far).item() == pytest.approx(2e199)
    assert tc.link.both(first_weight=0.0, second_weight=0.0)(chosen, rejected).tolist() == [0.0, 0.0]


def test_alpha_logistic():
    """AlphaPO on the means of the golden pair; an alpha near 0 is SimPO."""
    chosen, rejected = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-1.7 / 3, -1.2))
    loss = tc.link.alpha_logistic(2.5, 0.3125, 0.25)(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx(0.1734061836, abs=6e-11)
    assert chosen.grad.item() / 3 == pytest.approx(-0.152861355, abs=6e-10)
    assert rejected.grad.item() / 2 == pytest.approx(0.268628605, abs=6e-10)
    for alpha in (0.0, 1e-9, -1e-9):
        near = tc.link.alpha_logistic(2.5, 0.3, alpha)(chosen, rejected)
        torch.testing.assert_close(near, tc.link.logistic(2.5, 0.3)(chosen, rejected))


@dataclass(frozen=True)
class own_logistic(tc.link.Link):
    """A user's link, which torch differentiates."""

    beta: float = 0.3

    def __call__(self, chosen, rejected):
        return -torch.nn.functional.logsigmoid(self.beta * (chosen - rejected))


@dataclass(frozen=True)
class no_link(tc.link.Link):
    def __call__(self, chosen, rejected):
        return torch.zeros_like(chosen)


@pytest.mark.parametrize("normalization", ["sum", "mean"])
def test_a_link_of_a_user(normalization):
    batch, current = naive.random_pairs(pairs=4)
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    objectives = [tc.Preference(normalization=normalization, link=x) for x in (own_logistic(), tc.link.logistic(0.3))]
    naive.check_same(objectives, batch, current)
    nothing, grad = naive.gradient(tc.Preference(link=no_link()), batch, current)
    assert nothing.loss == 0 and not grad.any()


@pytest.mark.parametrize("link", [own_logistic(), tc.link.logistic(0.3), tc.link.discopop(), tc.link.squared()])
def test_nan_reaches_every_token_of_its_pair(link):
    batch, current = naive.random_pairs(pairs=3)
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    pair = batch.pairing.pairs[0].tolist()
    current = current.clone()
    token = int(batch.begin[pair[1]]) + batch.response_mask[int(batch.begin[pair[1]]) :].nonzero()[0]
    current.view(-1)[token] = math.nan
    out, grad = naive.gradient(tc.Preference(link=link), batch, current)
    rows = naive.rows_of(batch)
    assert out.loss.isnan()
    for r in range(batch.num_rows):
        assert batch.flat(grad)[rows[r]].isnan().all() == (r in pair or not len(rows[r]))
