"""Ragged rows of four prompts in shuffled order, before any host has laid them out, and their advantages and loss."""

import tokcredit as tc
import torch

PROMPTS, SIZE = 4, 4


def batch(seed=0):
    """Rows as dicts. Those of a prompt begin alike and branch somewhere inside; tokens of a tool are masked."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for prompt in range(PROMPTS):
        for _ in range(SIZE):
            length = int(torch.randint(3, 9, (1,), generator=g))
            mask = torch.rand(length, generator=g) > 0.2
            mask[0] = True
            old = -1 - torch.rand(length, generator=g)
            rows.append(
                dict(
                    group=prompt,
                    prompt=torch.arange(10, 12 + prompt),
                    response=torch.randint(5, 7, (length,), generator=g),
                    mask=mask,
                    reward=float(torch.randint(0, 3, (1,), generator=g)) / 2,
                    old_log_probs=old,
                    rollout_log_probs=old + 0.3 * torch.randn(length, generator=g),
                    log_probs=old + 0.3 * torch.randn(length, generator=g),
                )
            )
    return [rows[i] for i in torch.randperm(len(rows), generator=g).tolist()]


def rollouts(rows):
    """The responses, packed."""
    lengths = torch.tensor([len(row["response"]) for row in rows])

    def flat(name):
        return torch.cat([row[name] for row in rows])

    return tc.Rollouts(
        flat("response"),
        torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
        torch.tensor([row["group"] for row in rows]),
        torch.tensor([row["reward"] for row in rows]),
        flat("mask"),
        flat("old_log_probs"),
        flat("rollout_log_probs"),
    )


def expected(objective, rows):
    """The advantages, the loss of all rows, and its gradient to their log-probs, packed."""
    data = rollouts(rows)
    prepared = objective.prepare(data)
    log_probs = torch.cat([row["log_probs"] for row in rows]).requires_grad_()
    loss = objective.loss(prepared, log_probs).loss
    loss.backward()
    assert log_probs.grad.abs().sum() > 0.01
    return prepared.advantages, loss.detach(), log_probs.grad


def left(xs, width=None, value=0):
    """Rows as ``(B, T)``, padded at the left."""
    width = width or max(map(len, xs))
    return torch.stack([torch.nn.functional.pad(x, (width - len(x), 0), value=value) for x in xs])


def right(xs, width=None, value=0):
    """Rows as ``(B, T)``, padded at the right."""
    width = width or max(map(len, xs))
    return torch.stack([torch.nn.functional.pad(x, (0, width - len(x)), value=value) for x in xs])
