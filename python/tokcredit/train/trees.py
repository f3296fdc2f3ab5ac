"""Rollout collection that branches: every prompt grows a tree, and every edge of it is a row."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from tokcredit.rollouts import Rollouts
from tokcredit.train.rollout_collection import RolloutCollection, RolloutCollector, SamplingContext
from tokcredit.train.scoring import left_padded


class _Edge(NamedTuple):
    """An edge: ``path`` are the tokens above it, ``own`` its tokens; a ``leaf`` has nothing below."""

    prompt: int
    node: int
    parent: int
    path: list[int]
    own: list[int]
    log_probs: list[float]
    leaf: bool
    finished: bool


def _rewards_of_edges(edges: list[_Edge], of_leaves: dict[int, float]) -> list[float]:
    """Return the reward of each leaf, 0 for the edges above a leaf that has a reward, and NaN for other edges."""
    reward = [math.nan] * len(edges)
    # Edges come after the edge above them.
    for edge in reversed(edges):
        if edge.leaf:
            reward[edge.node] = of_leaves[edge.node]
        if edge.parent >= 0 and not math.isnan(reward[edge.node]):
            reward[edge.parent] = 0.0
    return reward


class Trees(RolloutCollector):
    """Grows ``widths[d]`` children at depth d, each a segment of tokens; those of the last level continue to the end.

    A child that the model ended is a leaf, and so is every child of the last level. The reward of a leaf is that of the
    whole text from the prompt on; other edges have reward 0. A row holds the tokens of the path above its edge, with a
    False ``response_mask``, and its own tokens; ``node_ids`` and ``parent_ids`` connect the edges. The tokens of a
    response are shared out evenly over the levels unless the setting ``segment`` is given.

    Args:
        context: Problems and sampler.

    Raises:
        ValueError: There is no level, or the segments leave no token for the last one.
    """

    def __init__(self, context: SamplingContext) -> None:
        super().__init__(context)
        s = context.settings.sampling
        levels = len(s.widths)
        self._segment = s.segment or max(1, s.max_tokens // max(levels, 1))
        if levels == 0 or self._segment * (levels - 1) >= s.max_tokens:
            expected = f"less than {s.max_tokens} tokens above the last of {levels} levels"
            raise ValueError(f"segment: expected {expected}, got {self._segment} on each")

    def _collect(self, number: int) -> RolloutCollection:
        context = self._context
        groups, chosen = context.chosen(number)
        prompts = [context.prompt(p) for p in chosen]
        context.sampler.sync()
        with torch.random.fork_rng():
            context.seeded(number)
            edges = self._grow(prompts)
        leaves = [e for e in edges if e.leaf]
        texts = context.tokenizer.batch_decode([e.path + e.own for e in leaves], skip_special_tokens=True)
        of_leaves = context.rewards([chosen[e.prompt] for e in leaves], texts)
        reward = dict(zip((e.node for e in leaves), of_leaves, strict=True))
        lengths = torch.tensor([len(e.path) + len(e.own) for e in edges])
        device = context.sampler.device
        rewards = torch.tensor(_rewards_of_edges(edges, reward), device=device)
        batch = Rollouts(
            torch.tensor([t for e in edges for t in e.path + e.own], device=device),
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device),
            group_ids=torch.tensor([groups[e.prompt] for e in edges], device=device),
            rewards=rewards.nan_to_num(),
            response_mask=torch.tensor([x for e in edges for x in [False] * len(e.path) + [True] * len(e.own)]).to(
                device
            ),
            rollout_log_probs=torch.tensor(
                [x for e in edges for x in [0.0] * len(e.path) + e.log_probs], device=device
            ),
            extras={
                "prompt_tokens": left_padded([prompts[e.prompt] for e in edges], -1, device)[0],
                "node_ids": torch.tensor([e.node for e in edges], device=device),
                "parent_ids": torch.tensor([e.parent for e in edges], device=device),
            },
        )
        return RolloutCollection(
            [chosen[e.prompt] for e in edges],
            context.tokenizer.batch_decode([e.own for e in edges], skip_special_tokens=True),
            batch,
            torch.tensor([reward[e.node] for e in leaves]),
            torch.tensor([groups[e.prompt] for e in leaves]),
            torch.tensor([e.finished for e in leaves]),
            rewards.isnan(),
        )

    def _grow(self, prompts: list[list[int]]) -> list[_Edge]:
        context, s = self._context, self._context.settings.sampling
        depth = len(s.widths)
        edges: list[_Edge] = []
        # A negative parent stands for the prompt.
        open_ends = [(i, -1, list[int]()) for i in range(len(prompts))]
        for level, width in enumerate(s.widths):
            last = level == depth - 1
            limit = s.max_tokens - self._segment * level if last else self._segment
            made = context.complete([prompts[i] + path for i, _, path in open_ends], width, s.temperature, limit)
            rows = made.tokens.split(made.cu_seqlens.diff().tolist())
            log_probs = made.log_probs.split(made.cu_seqlens.diff().tolist())
            below = []
            for j, (own, sampled, finished) in enumerate(zip(rows, log_probs, made.finished.tolist(), strict=True)):
                i, parent, path = open_ends[j // width]
                edge = _Edge(i, len(edges), parent, path, own.tolist(), sampled.tolist(), last or finished, finished)
                edges.append(edge)
                if not edge.leaf:
                    below.append((i, edge.node, path + edge.own))
            open_ends = below
        return edges
