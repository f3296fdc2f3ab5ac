"""Advantages of groups, beside verl's estimators."""

from __future__ import annotations

import tokcredit as tc
import torch
from harness import Table, close, main
from tokcredit import ops, scan, segment


def optimal_baseline(rewards, old, energy, batch):
    """``A[t] = G[t] - sum_rows(G W)[t] / sum_rows(W)[t]``, sums over the rows of a group; also G.

    W is the sum up to t of ``1 - 2 p + sum(p^2)``; where only the longest row of its group is left, its baseline is 0.
    """
    group, shape = batch.group_index, old.shape
    energies = old.exp().mul_(-2).add_(1).add_(energy)
    path = scan.cumulative(energies.view(-1), batch.rows).view(shape)
    after = scan.returns(rewards.reshape(-1), batch.rows).view(shape)
    weights = path.new_full((batch.num_groups, shape[1]), 1e-8).index_add_(0, group, path)
    baselines = torch.zeros_like(weights).index_add_(0, group, torch.mul(after, path, out=path)).div_(weights)
    advantages = baselines[group]
    longest = segment.maximum(batch.lengths.float(), ids := segment.Ids(group, batch.num_groups))
    first = batch.lengths == longest[group]
    alone = segment.sum(first.float(), ids)[group] == 1
    others = torch.where(first, 0, batch.lengths)
    second = segment.maximum(others.float(), ids).long()
    for row in (first & alone).nonzero()[:, 0].tolist():
        advantages[row, int(second[group[row]]) :] = 0
    return torch.sub(after, advantages, out=advantages).mul_(batch.shaped(batch.response_mask)), after


def run(table: Table, quick: bool) -> None:
    from incumbents import verl

    rows, length, size = (128, 1_024, 8) if quick else (1_024, 8_192, 16)
    n, shape = rows * length, f"{rows} x {length}"
    lengths = torch.randint(length // 2, length + 1, (rows,))
    mask = torch.arange(length) < lengths[:, None]
    real = mask.float()
    index = torch.arange(rows) // size
    uids = index.numpy()
    tokens = torch.zeros(rows, length, dtype=torch.int32)
    normalized = tc.credit.group_normalized()

    def ours(rewards):
        batch = tc.Rollouts.from_padded(tokens, mask, index, rewards.sum(1))
        return ops.spread(normalized(batch)[:, 0], batch.rows, batch.tokens).view(rows, length)

    known = tc.Rollouts.from_padded(tokens, mask, index, torch.zeros(rows))

    def of_batch(rewards):
        object.__setattr__(known, "rewards", rewards.sum(1))
        return ops.spread(normalized(known)[:, 0], known.rows, known.tokens).view(rows, length)

    def rewards():
        x = torch.zeros(rows, length)
        x[torch.arange(rows), lengths - 1] = torch.rand(rows)
        return x

    table.measure(
        "group advantages -> (B, T)",
        shape,
        lambda: (rewards(),),
        9 * n,  # rewards and mask read, advantages written
        {
            "tokcredit": ours,
            "tokcredit, batch given": of_batch,
            "verl, dictionary": lambda r: verl.compute_grpo_outcome_advantage(r, real, uids)[0],
            "verl, vectorised": lambda r: verl.compute_grpo_vectorized_outcome_advantage(r, real, uids)[0],
        },
        close(1e-4, 1e-4),
        {"verl, dictionary": 1, "verl, vectorised": 1},
    )

    old, energy = -2 * torch.rand(rows, length), torch.rand(rows, length)
    batch = tc.Rollouts.from_padded(tokens, mask, index, torch.zeros(rows))
    table.measure(
        "optimal token baseline",
        shape,
        lambda: (torch.randn(rows, length) * real,),
        21 * n,  # rewards, log-probs, sum of squares and mask read; advantages and returns written
        {
            "tokcredit": lambda r: optimal_baseline(r, old, energy, batch),
            "verl": lambda r: verl.compute_optimal_token_baseline_advantage(r, real, uids, old, energy),
        },
        close(2e-3, 2e-3),
        {"verl": 20},
    )


if __name__ == "__main__":
    main(run)
