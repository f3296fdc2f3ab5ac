import math

import naive
import tokcredit as tc
import torch


def test_formula():
    def formula(batch, log_probs):
        tokens = [t for row in naive.rows_of(batch) for t in row]
        order = sorted(tokens, key=lambda t: -batch.entropies[t].item())
        kept = set(order[: math.ceil(0.3 * len(tokens))])
        losses = naive.ppo(batch, log_probs, naive.group_advantages(batch), 0.8, 1.28)
        pairs = [x for row, own in zip(losses, naive.rows_of(batch), strict=True) for x in zip(row, own, strict=True)]
        return sum(x for x, t in pairs if t in kept) / len(kept)

    batch, current = naive.random_batch()
    naive.check(tc.methods.entropy_80_20(0.3), naive.with_inputs(batch, {"entropies"}), current, formula)


def test_by_hand():
    entropies = torch.tensor([[0.1, 0.9, 0.3, 1.2, 0.05], [0.7, 0.2, 0.8, 0.4, 0.6]])
    tokens = torch.zeros(2, 5, dtype=torch.long)
    batch = tc.Rollouts.from_padded(tokens, tokens == 0, tokens[:, 0], torch.tensor([1.0, 0.0]), entropies=entropies)
    assert tc.methods.entropy_80_20().prepare(batch).mask.nonzero()[:, 0].tolist() == [1, 3]


def test_defaults():
    assert tc.methods.entropy_80_20() == tc.Objective(
        filters=(tc.filters.top_share(0.2, tc.token_score.given("entropies")),),
        clip=tc.clip.ppo(0.2, 0.28, None),
        aggregation=tc.aggregation.token_mean(),
    )
