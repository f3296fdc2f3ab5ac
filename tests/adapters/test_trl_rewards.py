"""Reward functions of TRL that return a list for a completion: rewards of its tokens or of its turns."""

import os
import sys
from pathlib import Path

import pytest
import tokcredit as tc
import torch

pytest.importorskip("trl", reason="TRL is not installed; make test-trl")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import scripted
from tokcredit.adapters.trl import CreditGRPOTrainer

RETURNS = tc.Objective(tc.credit.returns(discount=0.5))


@pytest.fixture
def turns_of_rows(monkeypatch):
    """Number of turns of each completion of the last rollout."""
    made, reported = [], scripted.rollout

    def rollout(prompts, trainer):
        out = reported(prompts, trainer)
        made[:] = [len("".join(map(str, mask)).replace("0", " ").split()) for mask in out["env_mask"]]
        return out

    monkeypatch.setattr(scripted, "rollout", rollout)
    return made


async def tokens(completion_ids, **columns):
    return [torch.tensor([0.125 * t for t, _ in enumerate(ids)]) for ids in completion_ids]


def test_rewards_of_tokens_and_turns(tmp_path, turns_of_rows):
    """Lists of two functions, weighted; a number beside them is the outcome, and TRL logs sums."""

    def turns(completion_ids, **columns):
        counted = zip(completion_ids, turns_of_rows, strict=True)
        return [0.5 if ids[0] == 4 else [0.25 * (t + 1) for t in range(n)] for ids, n in counted]

    args = scripted.arguments(tmp_path, max_steps=1, reward_weights=[2.0, 1.0])
    trainer, gradients = scripted.train(CreditGRPOTrainer, args, [turns, tokens], objective=RETURNS)
    batch = trainer._prepared["train"].batch
    mask, ids = batch.response_mask.view(batch.shape), batch.tokens.view(batch.shape)
    dense, outcomes = torch.zeros(batch.shape), []
    for r, length in enumerate(batch.sizes.tolist()):
        number = ids[r, 0] == 4
        outcomes.append(1.0 if number else 0.0)
        turn, chosen = 0, [t for t in range(length) if mask[r, t]]
        for t in range(length):
            # Of a tool's token the reward is at the chosen one before it; the first token is always chosen.
            dense[r, max(u for u in chosen if u <= t)] += 0.125 * t
            if mask[r, t] and (t + 1 == length or not mask[r, t + 1]):
                turn += 1
                dense[r, t] += 0.0 if number else 2 * 0.25 * turn
    assert 0 < sum(outcomes) < len(outcomes) and max(turns_of_rows) > 1
    torch.testing.assert_close(batch.token_rewards.view(batch.shape), dense)
    torch.testing.assert_close(batch.outcome_rewards, torch.tensor(outcomes))
    logged = trainer.state.log_history[0]
    assert logged["reward"] == pytest.approx(float(dense.sum() + sum(outcomes)) / len(dense), rel=1e-5)
    assert logged.keys() >= {"rewards/turns/mean", "rewards/tokens/mean"} and gradients[0].norm() > 0


def test_lists_may_sum_to_the_numbers(tmp_path):
    """By chance they do in every completion; both count."""

    def spread(completion_ids, **columns):
        rewards = zip(scripted.reward(completion_ids), completion_ids, strict=True)
        return [[x, *[0.0] * (len(ids) - 1)] for x, ids in rewards]

    args = scripted.arguments(tmp_path, max_steps=1)
    trainer, gradients = scripted.train(CreditGRPOTrainer, args, [scripted.reward, spread], objective=RETURNS)
    batch = trainer._prepared["train"].batch
    assert batch.outcome_rewards.abs().max() > 0 and gradients[0].norm() > 0
    torch.testing.assert_close(batch.whole.rewards, 2 * batch.outcome_rewards)


def test_methods_of_whole_rewards(tmp_path):
    """They give the same with one number per completion and with lists that sum to it, unscored ones among them."""

    def spread(completion_ids, **columns):
        rewards = zip(scripted.sometimes(completion_ids), completion_ids, strict=True)
        return [x if x is None else [x, *[0.0] * (len(ids) - 1)] for x, ids in rewards]

    plain, listed = (
        scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path, max_steps=2), function, method="grpo")[1]
        for function in (scripted.sometimes, spread)
    )
    assert plain[0].norm() > 1e-2
    for ours, expected in zip(listed, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (
            lambda n: [1.0] * (n + 1),
            r"wrong: expected a number, or a list of one for each of the \d+ tokens or \d+ turns",
        ),
        (lambda n: [1.0] * (n - 1) + [None], "wrong: expected finite numbers in the list of completion 0, got None"),
        (lambda n: [float("nan")] * n, "wrong: expected finite numbers in the list of completion 0, got nan"),
    ],
)
def test_lists_that_fit_nothing(rewards, message, tmp_path):
    def wrong(completion_ids, **columns):
        return [rewards(len(ids)) for ids in completion_ids]

    with pytest.raises(ValueError, match=message):
        scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path), wrong, method="grpo")


def test_methods_that_need_lists(tmp_path):
    with pytest.raises(ValueError, match="token_rewards: expected in the batch because the objective reads"):
        scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path), method="mt_grpo")
