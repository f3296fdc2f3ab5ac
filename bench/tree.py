"""Prefix trees and tree credit beside a dictionary trie and the time of writing the result once.

Run: ``python bench/tree.py``. Equality is asserted before anything is timed.
"""

import argparse
import gc
import time

import tokcredit as tc
import torch


def workload(rows, length, group, seed=0):
    """Groups of random rows; each shares a prefix of random length with the first row of its group."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50_000, (rows, length), generator=generator)
    shared = torch.randint(0, length // 3, (rows,), generator=generator).tolist()
    for r in range(rows):
        first = r // group * group
        tokens[r, : shared[r]] = tokens[first, : shared[r]]
    rewards = torch.randint(0, 2, (rows,), generator=generator).float()
    return tc.Rollouts.from_padded(
        tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(rows) // group, rewards
    )


def trie(batch, group):
    """The same credit from one dictionary entry per distinct prefix: children, sum of rewards, count."""
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


def median(f, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--length", type=int, default=9200)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    a = parser.parse_args()
    batch = workload(a.rows, a.length, a.group)
    credit = tc.credit.tempo_like()
    small = workload(4 * a.group, min(a.length, 500), a.group, seed=1)
    torch.testing.assert_close(small.shaped(credit(small)), torch.tensor(trie(small, a.group)), rtol=1e-5, atol=1e-5)

    n = batch.num_tokens
    ours = median(lambda: credit(batch), a.repeats)
    build = median(lambda: tc.tree.build(batch), a.repeats)
    fresh = median(lambda: torch.zeros(n), a.repeats)
    buffer = torch.empty(n)
    memset = median(lambda: buffer.zero_(), a.repeats)
    gc.collect()
    dictionary = median(lambda: trie(batch, a.group), 1)
    print(f"{a.rows} rows x {a.length} tokens in groups of {a.group}, {tc.num_threads()} threads")
    print(f"{'tree + credit':<28}{ours * 1e3:>10.1f} ms")
    print(f"{'tree alone':<28}{build * 1e3:>10.1f} ms")
    print(f"{'dictionary trie':<28}{dictionary * 1e3:>10.1f} ms  {dictionary / ours:>7.0f} x ours")
    print(f"{'torch.zeros(N), fresh':<28}{fresh * 1e3:>10.1f} ms  ours is {ours / fresh:.1f} x")
    print(f"{'memset of N floats, reused':<28}{memset * 1e3:>10.1f} ms  ours is {ours / memset:.1f} x")


if __name__ == "__main__":
    main()
