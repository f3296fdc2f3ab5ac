"""Measure whole methods, ``prepare`` and ``loss`` with its gradient, beside GRPO in eager torch."""

from __future__ import annotations

import sys
from pathlib import Path

import tokcredit as tc
import torch
from harness import Dispatched, Table, main

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

LARGE, SMALL = (128, 4_096), (32, 512)
GROUP = 8
FAST = ("grpo", "dapo", "rloo", "ctpo", "gspo", "tempo")  # have a higher target at the small size
# Inputs that GRPO's forward pass over the batch does not give.
FURTHER_PASSES = ("reference", "teacher", "policy_groups", "continuations", "probes", "length_head")


def grpo(old, mask, rewards):
    """Return GRPO's ``prepare`` and ``loss`` in eager torch: the clipped loss, mean over tokens, then over rows."""

    def prepare():
        own = rewards.view(-1, GROUP)
        return ((own - own.mean(1, keepdim=True)) / (own.std(1, keepdim=True) + 1e-6)).view(-1, 1)

    def loss(log_probs, advantages):
        ratio = (log_probs - old).exp()
        each = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)) * mask
        return (each.sum(1) / mask.sum(1).clamp(min=1)).mean()

    return prepare, loss


def objectives():
    """Return the methods whose loss is given log-probs alone and which do not need pairs, by name."""
    found = {name: tc.methods.load(name) for name in tc.methods.names()}
    return {
        name: objective
        for name, objective in found.items()
        if objective.variables == ("log_probs",) and not isinstance(objective, tc.Preference)
    }


def further_passes(objective):
    """Return whether an objective reads inputs that take forward passes beyond those of GRPO."""
    return any(tc.inputs.get(name).collector in FURTHER_PASSES for name in objective.required_inputs)


def arguments(rows, length):
    """Return the tensors of a batch: rows of a group share the first quarter of their tokens."""
    old = -torch.rand(rows, length)
    # A tool's reply of fifty tokens in every thousand.
    mask = (torch.arange(length) + 100 * torch.arange(rows)[:, None]) % 1_000 >= 50
    tokens = torch.randint(0, 5, (rows, length))  # the synthetic `token_probs` have five tokens
    first = tokens.view(-1, GROUP, length)[:, :1, : length // 4]
    tokens[:, : length // 4] = first.repeat(1, GROUP, 1).view(rows, -1)
    return tokens, mask, torch.arange(rows) // GROUP, torch.rand(rows), old


def dispatched(objective, batch, current):
    """Return the number of torch operations that each step of a method dispatches."""
    counts = {}

    def count(step, f):
        with Dispatched() as seen:
            result = f()
        counts[step] = seen.counts.total()
        return result

    prepared = count("prepare", lambda: objective.prepare(batch, progress=0.5))
    loss = count("loss", lambda: objective.loss(prepared, current).loss)
    count("backward", loss.backward)
    count("select", lambda: prepared.select(range(0, batch.num_rows // 2)))
    return counts


def run(table: Table, quick: bool) -> None:
    for rows, length in (SMALL,) if quick else (LARGE, SMALL):
        measure(table, rows, length)


def measure(table: Table, rows: int, length: int) -> None:
    import naive

    shape, n = f"{rows} x {length}", rows * length
    tokens, mask, groups, rewards, old = arguments(rows, length)

    def make():
        batch = tc.Rollouts.from_padded(tokens, mask, groups, rewards, old_log_probs=old)
        return batch, batch.nonempty_groups

    prepare, loss = grpo(old, mask, rewards)
    current = (old + 0.02 * torch.randn(rows, length)).requires_grad_()

    def eager():
        current.grad = None
        loss(current, prepare()).backward()
        return current.grad

    def ours(objective, batch):
        def step():
            current.grad = None
            prepared = objective.prepare(batch, progress=0.5)
            objective.loss(prepared, current).loss.backward()
            return current.grad

        return step

    batch, _ = make()
    with Dispatched() as seen:
        make()
    torch.testing.assert_close(ours(tc.methods.grpo(), batch)(), eager(), rtol=1e-3, atol=1e-9)
    table.measure(
        "Rollouts and its groups",
        shape,
        lambda: (),
        n,  # the mask read
        {"tokcredit": make, "GRPO, torch eager": eager},
        dispatched={"make": seen.counts.total()},
    )
    methods = objectives()
    full = single(naive.with_inputs(batch, frozenset().union(*(o.required_inputs for o in methods.values()))))
    for name, objective in methods.items():
        batch = tc.Rollouts.from_padded(tokens, mask, groups, rewards, old_log_probs=old)
        batch = batch.with_inputs(**{name: full.input(name) for name in objective.required_inputs})
        assert batch.nonempty_groups.count == rows // GROUP  # sorts the groups, before anything is timed
        small = (rows, length) == SMALL
        target = None if small and further_passes(objective) else 1.5 if small and name in FAST else 1
        table.measure(
            f"prepare + loss, {name}",
            shape,
            lambda: (),
            13 * n,
            {"tokcredit": ours(objective, batch), "GRPO, torch eager": eager},
            targets={} if target is None else {"GRPO, torch eager": target},
            dispatched=dispatched(objective, batch, current),
        )


def single(batch):
    """Return a batch with its inputs as a trainer has them: float32, and values of states only at one token in 40."""
    elsewhere = torch.arange(batch.num_tokens) % 40 != 1

    def one(name):
        x = batch.input(name)
        x = x.float() if x.dtype == torch.float64 else x
        return x.masked_fill(elsewhere, torch.nan) if tc.inputs.get(name).nan_means_absent else x

    return batch.with_inputs(**{name: one(name) for name in tc.inputs.names() if batch.has_input(name)})


if __name__ == "__main__":
    main(run)
