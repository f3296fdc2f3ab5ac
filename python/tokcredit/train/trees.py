"""Rollouts that branch: every prompt grows a tree, and every edge of it is a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from tokcredit.rollouts import Rollouts
from tokcredit.train.explorer import SamplingContext, Explored
from tokcredit.train.scoring import left_padded
from tokcredit.train.tasks import Problem


class _Edge(NamedTuple):
    """``path`` are the tokens above, ``own`` those of the edge; ``leaf`` where nothing was grown below."""

    prompt: int
    node: int
    parent: int
    path: list[int]
    own: list[int]
    log_probs: list[float]
    leaf: bool
    finished: bool


class Trees:
    """Grows ``widths[d]`` children at depth d, each a segment of tokens; the last level goes on to the end.

    A child that ended by itself is a leaf, and so is one of the last level; leaves are rewarded for the whole text from
    the prompt on. A row has the tokens of the path above it, masked, and its own; ``node_ids`` and ``parent_ids`` tell
    how the edges hang together. The tokens of a reply are shared out evenly over the levels unless ``segment`` says
    how many one has.
    """

    def __init__(self, context: SamplingContext) -> None:
        s = context.settings.sampling
        self._context, levels = context, len(s.widths)
        self._segment = s.segment or max(1, s.max_tokens // max(levels, 1))
        if levels == 0 or self._segment * (levels - 1) >= s.max_tokens:
            expected = f"less than {s.max_tokens} tokens above the last of {levels} levels"
            raise ValueError(f"segment: expected {expected}, got {self._segment} on each")

    def explore(self, number: int) -> Explored:
        context = self._context
        numbers, chosen = context.chosen(number)
        prompts = [context.prompt(p.question) for p in chosen]
        context.sampler.sync()
        with torch.random.fork_rng():
            context.seeded(number)
            edges = self._grow(prompts)
        leaves = [e for e in edges if e.leaf]
        texts = context.tokenizer.batch_decode([e.path + e.own for e in leaves], skip_special_tokens=True)
        reward = {e.node: chosen[e.prompt].reward(text) for e, text in zip(leaves, texts, strict=True)}
        lengths = torch.tensor([len(e.path) + len(e.own) for e in edges])
        device = context.sampler.device
        batch = Rollouts(
            torch.tensor([t for e in edges for t in e.path + e.own], device=device),
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device),
            group_ids=torch.tensor([numbers[e.prompt] for e in edges], device=device),
            rewards=torch.tensor([reward.get(e.node, 0.0) for e in edges], device=device),
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
        return Explored(
            [chosen[e.prompt] for e in edges],
            context.tokenizer.batch_decode([e.own for e in edges], skip_special_tokens=True),
            batch,
            torch.tensor([reward[e.node] for e in leaves]),
            torch.tensor([e.finished for e in leaves]),
        )

    def _grow(self, prompts: list[list[int]]) -> list[_Edge]:
        context, s = self._context, self._context.settings.sampling
        depth = len(s.widths)
        edges: list[_Edge] = []
        # Numbers below every node's stand for prompts.
        open_ends = [(i, -1, list[int]()) for i in range(len(prompts))]
        for level, width in enumerate(s.widths):
            last = level == depth - 1
            limit = s.max_tokens - self._segment * level if last else self._segment
            made = context.complete([prompts[i] + path for i, _, path in open_ends], width, s.temperature, limit)
            rows = made.tokens.split(made.cu_seqlens.diff().tolist())
            log_probs = made.log_probs.split(made.cu_seqlens.diff().tolist())
            below = []
            for j, (own, drawn, finished) in enumerate(zip(rows, log_probs, made.finished.tolist(), strict=True)):
                i, parent, path = open_ends[j // width]
                edge = _Edge(i, len(edges), parent, path, own.tolist(), drawn.tolist(), last or finished, finished)
                edges.append(edge)
                if not edge.leaf:
                    below.append((i, edge.node, path + edge.own))
            open_ends = below
        return edges

    def attempt(self, problems: Sequence[Problem]) -> list[float]:
        return self._context.attempt(problems)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None
