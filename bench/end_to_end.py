"""Everything a method does to a batch, ``prepare`` and ``loss`` with its gradient, beside GRPO in eager torch."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import tokcredit as tc
import torch
from harness import Table, main

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def grpo(old, mask, rewards, groups):
    """Group-normalized rewards and the clipped loss, mean over tokens of each row, then over rows."""

    def prepare():
        own = rewards.view(groups, -1)
        return ((own - own.mean(1, keepdim=True)) / (own.std(1, keepdim=True) + 1e-6)).view(-1, 1)

    def loss(log_probs, advantages):
        ratio = (log_probs - old).exp()
        each = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)) * mask
        return (each.sum(1) / mask.sum(1).clamp(min=1)).mean()

    return prepare, loss


def run(table: Table, quick: bool) -> None:
    import naive

    rows, length, size = (32, 512, 8) if quick else (128, 4_096, 8)
    n = rows * length
    old = -torch.rand(rows, length)
    # A reply of a tool, fifty tokens long, in every thousand.
    mask = (torch.arange(length) + 100 * torch.arange(rows)[:, None]) % 1_000 >= 50
    tokens = torch.randint(0, 5, (rows, length))  # what the synthetic evidence has a vocabulary for
    tokens[:, : length // 4] = tokens.view(-1, size, length)[:, :1, : length // 4].repeat(1, size, 1).view(rows, -1)
    rewards = torch.rand(rows)
    batch = tc.Rollouts.from_padded(tokens, mask, torch.arange(rows) // size, rewards, old_log_probs=old)
    prepare, loss = grpo(old, mask, rewards, rows // size)
    current = (old + 0.02 * torch.randn(rows, length)).requires_grad_()

    def eager():
        current.grad = None
        loss(current, prepare()).backward()
        return current.grad

    def ours(objective, evidence):
        def step():
            current.grad = None
            prepared = objective.prepare(evidence, progress=0.5)
            objective.loss(prepared, current).loss.backward()
            return current.grad

        return step

    torch.testing.assert_close(ours(tc.methods.grpo(), batch)(), eager(), rtol=1e-3, atol=1e-9)
    objectives = {name: tc.methods.load(name) for name in tc.methods.names()}
    objectives = {name: o for name, o in objectives.items() if o.variable == "log_probs"}
    evidence = narrow(naive.with_evidence(batch, frozenset().union(*(o.required_inputs for o in objectives.values()))))
    for name, objective in objectives.items():
        table.measure(
            f"prepare + loss, {name}",
            f"{rows} x {length}",
            lambda: (),
            13 * n,
            {"tokcredit": ours(objective, evidence), "GRPO, torch eager": eager},
            targets={"GRPO, torch eager": 1},
        )


def narrow(batch):
    """The evidence as a trainer has it: in float32, and of states only at the steps, one in forty tokens."""
    between = torch.arange(batch.num_tokens) % 40 != 1
    of_states = ("state_values", "step_values", "answer_probs", "answer_confidences")

    def single(name, x):
        x = x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x
        return x.masked_fill(between, torch.nan) if name in of_states else x

    fields = {name: single(name, getattr(batch, name)) for name in tc.inputs.FIELDS}
    return replace(batch, **fields, extras={name: single(name, x) for name, x in batch.extras.items()})


if __name__ == "__main__":
    main(run)
