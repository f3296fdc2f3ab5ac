"""Measure advantages of groups beside verl's estimators."""

from __future__ import annotations

import tokcredit as tc
import torch
from harness import Table, close, main
from tokcredit import ops


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
        return ops.spread(normalized(batch)[:, 0], batch.spans).view(rows, length)

    known = tc.Rollouts.from_padded(tokens, mask, index, torch.zeros(rows))

    def of_batch(rewards):
        object.__setattr__(known, "rewards", rewards.sum(1))
        return ops.spread(normalized(known)[:, 0], known.spans).view(rows, length)

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

    p = torch.rand(rows, length).clamp_(min=1e-3)
    squares = p.square() + torch.rand(rows, length) * (1 - p).square()
    old = p.log()

    def least_variance(rewards):
        flat = (x.view(-1) for x in (old, squares, rewards))
        advantages, returns = ops.baseline(*flat, known.spans, known.group_index, known.num_groups, with_returns=True)
        return advantages.view(rows, length), returns.view(rows, length)

    table.measure(
        "optimal token baseline",
        shape,
        lambda: (torch.randn(rows, length) * real,),
        21 * n,  # rewards, log-probs, sum of squares and mask read; advantages and returns written
        {
            "tokcredit": least_variance,
            "verl": lambda r: verl.compute_optimal_token_baseline_advantage(r, real, uids, old, squares),
        },
        close(2e-3, 2e-3),
        {"verl": 20},
    )


if __name__ == "__main__":
    main(run)
