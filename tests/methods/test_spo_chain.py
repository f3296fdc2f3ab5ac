import math

import naive
import pytest
import tokcredit as tc
import torch

PROBABILITIES = [0.95, 0.5, 0.97, 0.3, 0.99, 0.8, 0.2, 0.96, 0.6, 0.95]
VALUES = {0: 0.4, 2: 0.5, 4: 0.7, 5: 0.6, 7: 0.8}  # by the last token of the state


def segments(values, reward, tokens):
    """Walks a row backwards from its reward; tokens before the first valued state get 0."""
    out, after, pending = {}, reward, []
    for t in reversed(tokens):
        pending.append(t)
        if not math.isnan(values[t]):
            out |= dict.fromkeys(pending, after - values[t])
            after, pending = values[t], []
    return out | dict.fromkeys(pending, 0.0)


def whitened(credit, counted):
    x = [credit[t] for t in counted]
    mean = sum(x) / len(x)
    var = sum((a - mean) ** 2 for a in x) / (len(x) - 1)
    return {t: (a - mean) / math.sqrt(var + 1e-8) for t, a in credit.items()}


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_formula(whiten, seed):
    batch, current = naive.random_batch(seed)
    batch = naive.with_inputs(batch, {"state_values"}, seed)

    def formula(batch, log_probs):
        rows, old = naive.rows_of(batch), batch.old_log_probs
        values = batch.extras["state_values"].tolist()
        credit = {}
        for r, tokens in enumerate(rows):
            credit |= segments(values, batch.rewards[r].item(), tokens)
        kept = [t for tokens in rows for t in tokens if old[t].exp() < 0.9]
        if whiten:
            credit = whitened(credit, kept)
        losses = [naive.clipped(credit[t], (log_probs[t] - old[t]).clamp(-10, 10).exp(), 0.8, 1.2) for t in kept]
        return sum(losses) / len(kept)

    naive.check(tc.methods.spo_chain(whiten=whiten), batch, current, formula)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [(2, [0, 0.3, 0, 0.3, 0, 0.1, 0.1, 0, 0.2, 0]), (1, [0, 0.1, 0, 0.2, 0, -0.1, 0.2, 0, 0.2, 0])],
)
def test_by_hand(interval, expected):
    batch = tc.Rollouts(
        torch.arange(10),
        torch.tensor([0, 10]),
        torch.tensor([0]),
        torch.tensor([1.0]),
        old_log_probs=torch.tensor(PROBABILITIES).log(),
    )
    cuts = tc.credit.improbable_cuts(batch, 0.9, interval)
    assert (cuts.nonzero()[:, 0] - 1).tolist() == ([0, 4, 7] if interval == 2 else [0, 2, 4, 5, 7])
    batch.extras["state_values"] = torch.tensor(
        [VALUES.get(t - 1, 9.0) if cut else math.nan for t, cut in enumerate(cuts)]
    )
    prepared = tc.methods.spo_chain().prepare(batch)
    credit = torch.where(prepared.mask, prepared.advantages, 0)
    assert credit.tolist() == pytest.approx(expected, abs=1e-6)
    assert prepared.mask.nonzero()[:, 0].tolist() == [1, 3, 5, 6, 8]


def test_rows_without_a_value_or_without_tokens_have_no_advantage():
    nan = math.nan
    batch = tc.Rollouts(
        torch.arange(5),
        torch.tensor([0, 2, 2, 5]),
        torch.tensor([0, 0, 0]),
        torch.tensor([1.0, 1.0, 0.5]),
        old_log_probs=torch.full((5,), -1.0),
        extras={"state_values": torch.tensor([nan, nan, nan, 0.25, nan])},
    )
    assert tc.methods.spo_chain().prepare(batch).advantages.tolist() == [0, 0, 0, 0.25, 0.25]


def test_equal_advantages_become_0():
    batch = tc.Rollouts(
        torch.arange(3),
        torch.tensor([0, 3]),
        torch.tensor([0]),
        torch.tensor([1.0]),
        old_log_probs=torch.full((3,), -1.0),
        extras={"state_values": torch.tensor([0.5, math.nan, math.nan])},
    )
    assert tc.methods.spo_chain(whiten=True).prepare(batch).advantages.tolist() == [0, 0, 0]


def test_defaults():
    assert tc.credit.improbable_cuts.__defaults__ == (0.9, 5)
    assert tc.methods.spo_chain() == tc.Objective(
        credit=tc.credit.value_changes("state_values"),
        filters=(tc.filters.improbable(0.9),),
        ratio=tc.ratio.token(bound=10.0, to="old_log_probs"),
        aggregation=tc.aggregation.token_mean(),
    )
