import math

import naive
import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize("mean", ["token_mean", "sequence_mean"])
def test_nll(mean):
    batch, current = naive.random_batch()
    objective = tc.Supervised(aggregation=getattr(tc.aggregation, mean)())

    def formula(batch, log_probs):
        return getattr(naive, mean)(batch, [[-log_probs[t] for t in tokens] for tokens in naive.rows_of(batch)])

    out = naive.check(objective, batch, current, formula)
    torch.testing.assert_close(out.metrics["loss"], out.loss.detach())
    assert set(out.metrics) == {"loss", "log_probs_mean", "tokens"} and objective.variables == ("log_probs",)


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl"])
def test_a_divergence_is_minimized(loss):
    """``loss`` is given the divergence of each token, with its gradient, and weighs and averages it."""
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"entropies"})
    objective = tc.Supervised(
        getattr(tc.supervised, loss)(),
        filters=(tc.filters.improbable(0.6),),
        token_weights=(tc.token_weights.raised(tc.token_score.given("entropies"), 0.5),),
    )
    assert objective.variables == (loss,)

    def formula(batch, divergence):
        kept = [t for row in naive.rows_of(batch) for t in row if batch.old_log_probs[t] < math.log(0.6)]
        return sum((1 + 0.5 * batch.entropies[t]) * divergence[t] for t in kept) / len(kept)

    out = naive.check(objective, batch, current.square(), formula)
    assert out.metrics[f"{loss}_mean"] > 0


def test_losses_of_a_partition_add_up():
    batch, current = naive.random_batch()
    objective = tc.mix("sft", filters="improbable(0.7)", aggregation="sequence_mean")
    prepared = objective.prepare(batch)
    pieces = [[4, 0, 2], [11, 1], [3, 5, 6, 7, 8, 9, 10]]
    x, y = current.clone().requires_grad_(), current.clone().requires_grad_()
    whole = objective.loss(prepared, x).loss
    parts = [objective.loss(prepared.select(rows), y[rows]).loss for rows in pieces]
    whole.backward()
    sum(parts).backward()
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(y.grad, x.grad)
    mini = objective.prepare(batch).minibatch(pieces[0])
    assert not torch.equal(mini.row_weights, prepared.select(pieces[0]).row_weights)


def test_nan_where_the_mask_is_false_reaches_nothing():
    batch, current = naive.random_batch()
    mask = batch.shaped(batch.response_mask)
    dirty = current.masked_fill(~mask, math.nan).requires_grad_()
    objective = tc.methods.sft()
    out = objective.loss(objective.prepare(batch), dirty)
    out.loss.backward()
    assert out.loss.isfinite() and dirty.grad.isfinite().all()
    torch.testing.assert_close(out.loss, objective.loss(objective.prepare(batch), current).loss)


def test_nan_at_a_token_that_trains_reaches_the_loss():
    batch, current = naive.random_batch()
    token = int(batch.response_mask.nonzero()[3, 0])
    current.view(-1)[token] = math.nan
    objective = tc.methods.sft()
    assert objective.loss(objective.prepare(batch), current).loss.isnan()


@pytest.mark.parametrize(
    "stages",
    [
        {"token_weights": (tc.token_weights.icepop(high=1.5),)},
        {"token_weights": (tc.token_weights.mis(high=1.5),)},
        {"scales": (tc.scale.within("ratio", "token", 0.5, 2.0, "any"),)},
    ],
)
def test_an_infinite_divergence_at_a_token_of_weight_0_does_not_count(stages):
    """Whether a token has the weight, or a row, or the current policy says it."""
    old = torch.zeros(4, dtype=torch.float64)
    batch = tc.Rollouts(
        torch.arange(4),
        torch.tensor([0, 2, 4]),
        torch.arange(2),
        torch.zeros(2, dtype=torch.float64),
        old_log_probs=old,
        rollout_log_probs=torch.tensor([-1.0, -1.0, 0.0, 0.0]).double(),
    )
    objective = tc.Supervised(tc.supervised.forward_kl(), **stages)
    prepared = objective.prepare(batch)
    current = dict.fromkeys(objective.variables[1:], torch.tensor([-3.0, -3.0, 0.0, 0.0]).double())
    value = torch.tensor([math.inf, math.inf, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    out = objective.loss(prepared, value, **current)
    out.loss.backward()
    assert out.loss.item() == 0.75 and value.grad.tolist() == [0, 0, 0.25, 0.25]


def test_advantages_are_the_weights_of_tokens():
    batch, _ = naive.random_batch()
    batch = naive.with_inputs(batch, {"entropies"})
    prepared = tc.mix("sft", token_weights="raised(given('entropies'), 0.5)").prepare(batch)
    mask = batch.shaped(batch.response_mask)
    torch.testing.assert_close(prepared.advantages[mask], (1 + 0.5 * batch.shaped(batch.entropies))[mask])
    assert not prepared.advantages[~mask].any()
    assert torch.equal(prepared.has_gradient, batch.lengths > 0)


def test_other_variables_are_refused():
    batch, current = naive.random_batch()
    objective = tc.methods.sft()
    with pytest.raises(TypeError, match="entropies: expected no further variable, got entropies"):
        objective.loss(objective.prepare(batch), current, entropies=current)
    with pytest.raises(ValueError, match=r"log_probs: expected \[12, 7\], got \[12, 6\]"):
        objective.loss(objective.prepare(batch), current[:, 1:])
