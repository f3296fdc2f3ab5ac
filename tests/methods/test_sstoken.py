import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.sstoken import improved_share, prompt_attention
from tokcredit.supervised import nll


def kept_of(row, batch, log_probs, rho, gamma):
    """Positions of one row that train."""
    improvement = [(log_probs[t] - batch.ref_log_probs[t]).item() for t in row]
    low, high = min(improvement, default=0), max(improvement, default=0)
    attention = [batch.extras["prompt_attention"][t].item() for t in row]
    score = [
        gamma * (x - low) / (high - low + 1e-8) + (1 - gamma) * a for x, a in zip(improvement, attention, strict=True)
    ]
    best = sorted(range(len(row)), key=lambda i: (-score[i], i))[: math.ceil(rho * len(row) - 1e-9)]
    return [row[i] for i in best]


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("rho", [0.6, 0.3])
def test_formula(rho, per_row):
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"ref_log_probs", "prompt_attention"})

    def formula(batch, log_probs):
        kept = [kept_of(row, batch, log_probs, rho, 0.7) for row in naive.rows_of(batch)]
        losses = [[-log_probs[t] for t in row] for row in kept]
        if per_row:
            return naive.sequence_mean(batch, losses)
        return sum(sum(x) for x in losses) / sum(map(len, losses))

    naive.check(tc.methods.sstoken(rho, 0.7, per_row=per_row), batch, current, formula)


def one_row(history, attention):
    n = len(history)
    return tc.Rollouts(
        torch.arange(n + 1),
        torch.tensor([0, n + 1]),
        torch.tensor([0]),
        torch.tensor([0.0]),
        torch.arange(n + 1) > 0,
        ref_log_probs=torch.tensor([math.nan, *history], dtype=torch.float64).neg(),
        extras={"prompt_attention": torch.tensor([math.nan, *attention], dtype=torch.float64)},
    )


HISTORY, CURRENT, ATTENTION = [2, 1, 0.5, 3, 0.2], [1, 1.1, 0.4, 1.5, 0.2], [0.1, 0.6, 0.3, 0.2, 0.5]


def trained(objective, batch, losses):
    log_probs = torch.tensor([math.nan, *losses], dtype=torch.float64).neg().requires_grad_()
    out = objective.loss(objective.prepare(batch), log_probs)
    out.loss.backward()
    return out.loss.item(), log_probs.grad[1:].nonzero()[:, 0].tolist()


def test_by_hand():
    # Improvements 1 -0.1 0.1 1.5 0 are scaled to 0.6875 0 0.125 1 0.0625: scores 0.39375 0.3 0.2125 0.6 0.28125.
    loss, kept = trained(tc.methods.sstoken(), one_row(HISTORY, ATTENTION), CURRENT)
    assert loss == pytest.approx(1.2) and kept == [0, 1, 3]
    assert trained(tc.methods.sstoken(gamma=0.0), one_row(HISTORY, ATTENTION), CURRENT)[1] == [1, 2, 4]
    assert trained(tc.methods.sstoken(gamma=1.0), one_row(HISTORY, ATTENTION), CURRENT)[1] == [0, 2, 3]
    # Equal improvements: attention decides, and ties go to the lower index.
    assert trained(tc.methods.sstoken(), one_row(CURRENT, ATTENTION), CURRENT)[1] == [1, 2, 4]
    assert trained(tc.methods.sstoken(), one_row(CURRENT, [0.5] * 5), CURRENT)[1] == [0, 1, 2]


def test_all_tokens_are_sft():
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"ref_log_probs", "prompt_attention"})
    naive.check_same((tc.methods.sstoken(1.0), tc.methods.sft()), batch, current)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_selected_and_scales_nothing(value):
    """The other tokens are chosen as if it were not there."""
    loss, kept = trained(tc.methods.sstoken(), one_row(HISTORY, [0.0, *ATTENTION[1:]]), [value, *CURRENT[1:]])
    assert not math.isfinite(loss) and kept == [0, 1, 3]


def test_counts_are_those_of_the_selection():
    """In float 0.7 * 10 is a little above 7."""
    batch, current = naive.random_batch(length=31)
    batch = naive.with_inputs(batch, {"ref_log_probs", "prompt_attention"})
    for rho in (0.1, 0.3, 0.6, 0.7, 1.0):
        prepared = tc.methods.sstoken(rho).prepare(batch)
        kept = prepared.objective.selection(current.reshape(-1), batch, prepared.spans).view(12, 31).sum(1)
        assert torch.equal(prepared.lengths, kept)
    assert tc.methods.sstoken().separable(prepared) is False


def test_a_schedule_of_attention_alone_first():
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"ref_log_probs", "prompt_attention"})
    scheduled = tc.methods.sstoken(gamma=tc.schedule.linear(0.0, 0.5))
    for progress, gamma in ((0.0, 0.0), (1.0, 0.5)):
        plain = tc.methods.sstoken(gamma=gamma)
        ours = scheduled.loss(scheduled.prepare(batch, progress=progress), current).loss
        assert ours == plain.loss(plain.prepare(batch), current).loss


@pytest.mark.parametrize("block", [1, 3, 256])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_to_the_prompt(key_heads, block):
    g = torch.Generator().manual_seed(0)
    query = torch.randn(4, 7, 6, generator=g, dtype=torch.float64)
    key = torch.randn(key_heads, 7, 6, generator=g, dtype=torch.float64)
    prompt = torch.tensor([1, 1, 0, 0, 1, 0, 0]).bool()  # two turns
    expected = torch.zeros(7, dtype=torch.float64)
    for head in range(4):
        for i in range(7):
            scores = (query[head, i] @ key[head * key_heads // 4, : i + 1].T) / math.sqrt(6)
            expected[i] += scores.softmax(0)[prompt[: i + 1]].sum() / 4
    torch.testing.assert_close(prompt_attention(query, key, prompt, block=block), expected)


def test_shapes_of_attention_are_checked():
    query, prompt = torch.ones(4, 7, 6), torch.ones(7, dtype=torch.bool)
    for bad in (torch.ones(3, 7, 6), torch.ones(4, 7, 5), torch.ones(7, 6)):
        with pytest.raises(ValueError, match=r"key: expected float \[key heads, 7, 6\], got"):
            prompt_attention(query, bad, prompt)
    with pytest.raises(ValueError, match="block: expected a whole number at least 1, got 0"):
        prompt_attention(query, query, prompt, block=0)
    assert not prompt_attention(query, query, ~prompt).any()


def test_defaults():
    assert tc.methods.sstoken() == tc.Supervised(
        nll(),
        aggregation=tc.aggregation.token_mean(),
        selection=improved_share(0.6, 0.5, "ref_log_probs", "prompt_attention"),
    )
    assert tc.methods.sstoken(per_row=True).aggregation == tc.aggregation.sequence_mean()
