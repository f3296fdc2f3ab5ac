import naive
import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cap", [None, 1.3])
def test_formula(seed, cap):
    def formula(batch, log_probs):
        losses = naive.ppo(batch, log_probs, naive.group_advantages(batch), 0.8, 1.3, cap)
        return naive.sequence_mean(batch, losses)

    out = naive.check(tc.methods.grpo(clip_high=0.3, cap=cap), *naive.random_batch(seed), formula)
    assert out.metrics["clip_low_fraction"] > 0 and out.metrics["clip_high_fraction"] > 0


def test_by_hand():
    batch = tc.Rollouts(
        torch.arange(3), torch.tensor([0, 1, 3]), torch.zeros(2, dtype=torch.long), torch.tensor([1.0, 0.0])
    )
    prepared = tc.methods.grpo().prepare(batch)
    # mean 0.5, sample std 0.7071: +-0.5 / 0.7071
    assert prepared.advantages.tolist() == pytest.approx([0.70711, -0.70711, -0.70711], abs=1e-5)
    log_probs = torch.zeros(3, requires_grad=True)
    tc.methods.grpo().loss(prepared, log_probs).loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([-0.35355, 0.17678, 0.17678], abs=1e-5)


def test_group_of_one_has_its_reward_as_advantage_and_equal_rewards_have_none():
    batch = tc.Rollouts(
        torch.arange(3), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1]), torch.tensor([2.0, 3.0, 3.0])
    )
    assert tc.methods.grpo().prepare(batch).advantages.tolist() == pytest.approx([2.0, 0.0, 0.0], abs=1e-5)
    assert tc.methods.grpo().prepare(batch).has_gradient.tolist() == [True, False, False]


@pytest.mark.parametrize("limit", [float("inf"), 10.0])
def test_kl_of_the_paper_and_of_verl(limit):
    """k3 per token with the aggregation of the method; verl clamps it at 10, beyond which it has no gradient."""
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    batch.ref_log_probs[::5] += 3.0  # k3 of about 16

    def formula(batch, log_probs):
        losses = naive.ppo(batch, log_probs, naive.group_advantages(batch), 0.8, 1.2)
        rows = naive.rows_of(batch)
        u = {t: log_probs[t] - batch.ref_log_probs[t] for row in rows for t in row}
        k3 = {t: ((-x).exp() + x - 1).clamp(max=limit) for t, x in u.items()}
        assert max(x.item() for x in k3.values()) == 10 or limit > 10
        return naive.sequence_mean(batch, losses) + 0.04 * naive.sequence_mean(
            batch, [[k3[t] for t in row] for row in rows]
        )

    naive.check(tc.mix("grpo", terms=f"kl(0.04, limit={limit})"), batch, current, formula)


def test_rows_without_a_chosen_token_count_for_parity():
    # Rewards 1 and 0 with tokens, 5 without: the mean is 0.5, or 2 with all three rows.
    batch = tc.Rollouts(
        torch.arange(3),
        torch.arange(4),
        torch.zeros(3, dtype=torch.long),
        torch.tensor([1.0, 0.0, 5.0]),
        torch.tensor([True, True, False]),
    )
    plain = tc.methods.grpo(scale=False).prepare(batch).advantages
    assert plain.tolist() == pytest.approx([0.5, -0.5, 0])
    parity = tc.mix("grpo", credit="group_normalized(scale=False, count_empty=True)").prepare(batch).advantages
    assert parity.tolist() == pytest.approx([-1.0, -2.0, 0])


def test_defaults():
    assert tc.methods.grpo() == tc.Objective(
        credit=tc.credit.group_normalized(scale=True, epsilon=1e-6, count_empty=False),
        filters=(),
        token_weights=(),
        ratio=tc.ratio.token(bound=20.0, to="old_log_probs"),
        clip=tc.clip.ppo(low=0.2, high=0.2, cap=None),
        scales=(),
        aggregation=tc.aggregation.sequence_mean(),
        terms=(),
    )
    assert tc.methods.grpo() == tc.Objective()
