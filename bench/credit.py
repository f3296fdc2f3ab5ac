"""Advantages of groups, beside verl's estimators."""

from __future__ import annotations

import tokcredit as tc
import torch
from harness import Table, close, main
from tokcredit import ops, scan
from tokcredit.ops import Rows


def optimal_baseline(returns_of, old, energy, mask, groups):
    """``A[t] = G[t] - sum_rows(G W)[t] / sum_rows(W)[t]``, group by group, so that what is in between stays in cache.

    W is the sum up to t of ``1 - 2 p + sum(p^2)``; where only the longest row of its group is left, its baseline is 0.
    """
    advantages, returns = torch.empty_like(old), torch.empty_like(old)
    length = old.shape[1]
    for rows in groups:
        own = mask[rows]
        begin = torch.arange(len(rows)) * length
        spans = Rows(begin, begin + length, own.reshape(-1))
        energies = old[rows].exp_().mul_(-2).add_(1).add_(energy[rows])
        path = scan.cumulative(energies.reshape(-1), spans).view(-1, length)
        after = scan.returns(returns_of[rows].reshape(-1), spans).view(-1, length)
        baseline = (after * path).sum(0) / (path.sum(0) + 1e-8)
        lengths = own.sum(1)
        longest, second = lengths.topk(2).values.tolist()
        baselines = baseline.expand(len(rows), length)
        if longest > second:
            baselines = baselines.clone()
            baselines[lengths.argmax(), second:] = 0
        advantages[rows] = (after - baselines).mul_(own)
        returns[rows] = after
    return advantages, returns


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
            "verl, dictionary": lambda r: verl.compute_grpo_outcome_advantage(r, real, uids)[0],
            "verl, vectorised": lambda r: verl.compute_grpo_vectorized_outcome_advantage(r, real, uids)[0],
        },
        close(1e-4, 1e-4),
        {"verl, dictionary": 1, "verl, vectorised": 1},
    )

    old, energy = -2 * torch.rand(rows, length), torch.rand(rows, length)
    groups = list(torch.arange(rows).split(size))
    table.measure(
        "optimal token baseline",
        shape,
        lambda: (torch.randn(rows, length) * real,),
        21 * n,  # rewards, log-probs, sum of squares and mask read; advantages and returns written
        {
            "tokcredit": lambda r: optimal_baseline(r, old, energy, mask, groups),
            "verl": lambda r: tuple(
                x * real for x in verl.compute_optimal_token_baseline_advantage(r, real, uids, old, energy)
            ),
        },
        close(2e-3, 2e-3),
        {"verl": 20},
    )


if __name__ == "__main__":
    main(run)
