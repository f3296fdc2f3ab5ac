"""Measure prefix trees and tree credit beside TRL's TreeRow, a dictionary trie and writing the result once."""

from __future__ import annotations

import tokcredit as tc
import torch
from harness import Table, main


def workload(rows, length, group, seed=0):
    """Return groups of random rows; each row shares a prefix of random length with the first of its group."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50_000, (rows, length), generator=generator)
    shared = torch.randint(0, max(length // 3, 1), (rows,), generator=generator).tolist()
    for r in range(rows):
        first = r // group * group
        tokens[r, : shared[r]] = tokens[first, : shared[r]]
    rewards = torch.randint(0, 2, (rows,), generator=generator).float()
    return tc.Rollouts.from_padded(
        tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(rows) // group, rewards
    )


def trie(batch, group):
    """Return the same advantages, from a dictionary entry for each prefix: children, sum of rewards, count."""
    tokens, rewards = batch.shaped(batch.tokens).tolist(), batch.rewards.tolist()
    out = []
    for start in range(0, len(tokens), group):
        own = rewards[start : start + group]
        mean = sum(own) / group
        std = (sum((r - mean) ** 2 for r in own) / (group - 1)) ** 0.5 + 1e-6
        root = [{}, 0.0, 0]
        for row, reward in zip(tokens[start : start + group], own, strict=True):
            node = root
            node[1] += reward
            node[2] += 1
            for token in row:
                node = node[0].setdefault(token, [{}, 0.0, 0])
                node[1] += reward
                node[2] += 1
        for row, reward in zip(tokens[start : start + group], own, strict=True):
            node, credit = root, []
            for token in row:
                child = node[0][token]
                credit.append((reward - mean + child[1] / child[2] - node[1] / node[2]) / std)
                node = child
            out.append(credit)
    return out


def tree_rows(batch, group):
    """Return TRL's trie of each group. It holds the tree alone, without advantages."""
    from incumbents import TreeRow

    tokens = batch.shaped(batch.tokens)
    rows = []
    for r in range(batch.num_rows):
        if r % group == 0:
            rows.append(TreeRow())
        rows[-1].add({"input_ids": tokens[r], "completion_mask": tokens[r] >= 0, "group_id": r // group})
    return rows


def check(group):
    """Check that our advantages equal the trie's, and that we share as much as TreeRow, which forks a token early."""
    batch = workload(4 * group, 500, group, seed=1)
    credit = batch.shaped(tc.methods.tempo().credit(batch))
    torch.testing.assert_close(credit, torch.tensor(trie(batch, group)), rtol=1e-5, atol=1e-5)
    built = tc.tree.build(batch)
    theirs = sum(len(row.tokens) for row in tree_rows(batch, group))
    inner = int((built.degree - 1).clamp(min=0).sum())
    assert int(built.length.sum()) <= theirs <= int(built.length.sum()) + inner


def run(table: Table, quick: bool) -> None:
    rows, length, group = (128, 1_024, 16) if quick else (1_024, 9_200, 16)
    check(group)
    batch = workload(rows, length, group)
    credit, n = tc.methods.tempo().credit, batch.num_tokens
    buffer = torch.empty(n)
    table.measure(
        "prefix tree + TEMPO credit",
        f"{rows} x {length}",
        lambda: (),
        # Two rows are read where they share a prefix, and the result is written.
        4 * n + 2 * 8 * int(batch.num_tokens - tc.tree.build(batch).length.sum()),
        {
            "tokcredit": lambda: credit(batch),
            "tree alone": lambda: tc.tree.build(batch),
            "memset, buffer in use": lambda: buffer.zero_(),
            "memset, memory fresh": lambda: torch.full((n,), 0.0),
        },
        targets={
            "TRL TreeRow": 500,
            "dictionary trie": 500,
            "memset, buffer in use": 0.25,
            "memset, memory fresh": 0.25,
        },
        once={"TRL TreeRow": lambda: tree_rows(batch, group), "dictionary trie": lambda: trie(batch, group)},
    )


if __name__ == "__main__":
    main(run)
