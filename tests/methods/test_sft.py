import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.supervised import nll

WEIGHTED = (tc.token_weights.raised(tc.token_score.given("entropies"), 0.5),)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weights", [(), WEIGHTED])
def test_formula(seed, weights):
    batch, current = naive.random_batch(seed)
    batch = naive.with_inputs(batch, {"entropies"})

    def formula(batch, log_probs):
        losses = [
            [-(1 + 0.5 * batch.entropies[t] if weights else 1) * log_probs[t] for t in tokens]
            for tokens in naive.rows_of(batch)
        ]
        return naive.token_mean(batch, losses)

    out = naive.check(tc.methods.sft(weights), batch, current, formula)
    mask = batch.response_mask
    assert out.metrics["tokens"] == mask.sum()
    assert out.metrics["log_probs_mean"].item() == pytest.approx(current.reshape(-1)[mask].mean().item())


def three_tokens():
    """A row of three tokens, the first of which is the prompt, and a row of one."""
    return tc.Rollouts(
        torch.arange(4),
        torch.tensor([0, 3, 4]),
        torch.tensor([0, 1]),
        torch.tensor([0.0, 5.0]),
        torch.tensor([False, True, True, True]),
        entropies=torch.tensor([0.0, 2.0, 0.0, 4.0]),
    )


def test_by_hand():
    # Log-probs -1, -2 and -6 of the three chosen tokens: the mean of their negatives is 3.
    log_probs = torch.tensor([-9.0, -1.0, -2.0, -6.0], requires_grad=True)
    objective = tc.methods.sft()
    out = objective.loss(objective.prepare(three_tokens()), log_probs)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(3.0)
    assert log_probs.grad.tolist() == pytest.approx([0, -1 / 3, -1 / 3, -1 / 3])
    # Weights 2, 1 and 3 leave the denominator alone: (2 * 1 + 1 * 2 + 3 * 6) / 3.
    log_probs.grad = None
    objective = tc.methods.sft(WEIGHTED)
    out = objective.loss(objective.prepare(three_tokens()), log_probs)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(22 / 3)
    assert log_probs.grad.tolist() == pytest.approx([0, -2 / 3, -1 / 3, -1])


def test_limit_cases():
    """Weights of 1, and a filter that keeps all tokens, are plain fine-tuning."""
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"entropies"})
    score = tc.token_score.given("entropies")
    plain = tc.methods.sft()
    expected = plain.loss(plain.prepare(batch), current).loss
    for objective in (
        tc.methods.sft((tc.token_weights.raised(score, 0.0),)),
        tc.mix("sft", filters=tc.filters.top_share(1.0, score, per_row=True)),
    ):
        torch.testing.assert_close(objective.loss(objective.prepare(batch), current).loss, expected)
    half = tc.mix("sft", filters=tc.filters.top_share(0.5, score, per_row=True))
    assert half.loss(half.prepare(batch), current).loss != expected


def test_rewards_and_groups_are_not_read():
    batch, current = naive.random_batch()
    objective = tc.methods.sft()
    expected = objective.loss(objective.prepare(batch), current).loss
    batch.rewards.fill_(7.0)
    batch.group_ids.zero_()
    assert torch.equal(objective.loss(objective.prepare(batch), current).loss, expected)
    with pytest.raises(ValueError, match="filters: expected filters that read no rewards, got mixed_groups"):
        tc.mix("sft", filters="mixed_groups")
    with pytest.raises(ValueError, match="aggregation: expected one that reads no advantages, got balanced"):
        tc.mix("sft", aggregation="ba")


def test_defaults():
    assert tc.methods.sft() == tc.Supervised(
        nll(), filters=(), token_weights=(), aggregation=tc.aggregation.token_mean()
    )
