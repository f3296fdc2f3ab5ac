"""The pair of the golden vectors, and pairs as lists of positions for formulas that are written row by row."""

import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.rollouts import FIELDS

CHOSEN, REJECTED = [-0.2, -1.0, -0.5], [-0.4, -2.0]
REFERENCE = [-0.3, -0.8, -0.7], [-0.3, -1.5]


def laid_out(chosen, rejected, prompt=math.nan):
    """Numbers of three chosen and two rejected tokens in the layout of :func:`pair`."""
    return torch.tensor([prompt, *chosen, prompt, *rejected], dtype=torch.float64)


def pair(**per_token):
    """A chosen row of three tokens and a rejected one of two, with a prompt token before each, NaN in every input."""
    named = {name: laid_out(*x) for name, x in {"ref_log_probs": REFERENCE, **per_token}.items()}
    return tc.Rollouts(
        torch.arange(7),
        torch.tensor([0, 4, 7]),
        torch.tensor([0, 0]),
        torch.tensor([1.0, 0.0]),
        torch.tensor([False, True, True, True, False, True, True]),
        **{name: x for name, x in named.items() if name in FIELDS},
        extras={name: x for name, x in named.items() if name not in FIELDS},
    )


def evaluated(objective, batch=None):
    """The loss of the pair, and its gradient at the five tokens."""
    log_probs = laid_out(CHOSEN, REJECTED, prompt=0.0).requires_grad_()
    out = objective.loss(objective.prepare(pair() if batch is None else batch), log_probs)
    out.loss.backward()
    assert log_probs.grad[[0, 4]].tolist() == [0, 0]
    return out, log_probs.grad[[1, 2, 3, 5, 6]].tolist()


def check(objective, value, gradient, batch=None, tolerance=6e-10):
    """The loss of the pair and its gradient are the golden ones, of nine digits that were rounded or cut."""
    out, found = evaluated(objective, batch)
    assert out.loss.item() == pytest.approx(value, abs=tolerance)
    assert found == pytest.approx(gradient, abs=1e-9)
    return out


def pairs_of(batch):
    """The positions of the chosen and of the rejected tokens of each pair."""
    rows = naive.rows_of(batch)
    for a, b in naive.group_rows(batch):
        yield (rows[a], rows[b]) if batch.rewards[a] > batch.rewards[b] else (rows[b], rows[a])


def mean_of_pairs(batch, loss):
    """The mean over pairs of ``loss(chosen positions, rejected positions)``."""
    losses = [loss(*positions) for positions in pairs_of(batch)]
    return sum(losses) / len(losses)


def softplus(x):
    """``log(1 + exp(x))``, which is ``-log sigmoid(-x)``."""
    return x.clamp(min=0) + (-x.abs()).exp().log1p()


def total(x, positions):
    """The sum of ``x`` at some positions."""
    return sum((x[t] for t in positions), torch.zeros((), dtype=torch.float64))


POLICY_LOGITS = [[1.0, 0.0, -1.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]
REFERENCE_LOGITS = [[0.8, 0.1, -0.9], [0.0, 0.6, 0.2], [0.2, 0.7, 0.1]]


def logits_pair(**extras):
    """A chosen row of two tokens, 0 and 1, and a rejected one of token 2, with the logits of policy and reference."""
    policy, reference = (torch.tensor(x, dtype=torch.float64) for x in (POLICY_LOGITS, REFERENCE_LOGITS))
    tokens = torch.tensor([0, 1, 2])
    batch = tc.Rollouts(
        tokens,
        torch.tensor([0, 2, 3]),
        torch.tensor([0, 0]),
        torch.tensor([1.0, 0.0]),
        ref_log_probs=reference.log_softmax(1).gather(1, tokens[:, None])[:, 0],
        extras={name: torch.tensor(x, dtype=torch.float64) for name, x in extras.items()},
    )
    return batch, policy.requires_grad_(), reference


def check_logits(objective, value, gradient, batch_and_logits=None, **variables):
    """The loss from the logits of :func:`logits_pair` and its gradient to them are the golden ones."""
    batch, policy, reference = batch_and_logits or logits_pair()
    log_probs = tc.log_probs.from_logits(policy, batch.tokens)
    divergence = tc.divergence.between(policy, reference, "forward_kl")
    out = objective.loss(objective.prepare(batch), log_probs, ref_forward_kl=divergence, **variables)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(value, abs=6e-11)
    torch.testing.assert_close(policy.grad, torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=6e-10)
    return out
