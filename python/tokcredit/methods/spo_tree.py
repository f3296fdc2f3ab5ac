"""Segment policy optimization, tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip, filters, ratio
from tokcredit.stages.base import flag, number
from tokcredit.stages.credit import Credit, whitened

Numbers = NDArray[np.float64]
Places = NDArray[np.int64]


def _parents(groups: Places, nodes: Places, parents: Places) -> Places:
    """Return the row that is the parent of each row, or -1 where it is the prompt. A node is one of its group."""
    row = {name: r for r, name in enumerate(zip(groups.tolist(), nodes.tolist(), strict=True))}
    if len(row) < len(nodes):
        raise ValueError("node_ids: expected each to occur once in its group, got one twice")
    names = zip(groups.tolist(), parents.tolist(), strict=True)
    return np.fromiter((row.get(name, -1) for name in names), np.int64, len(nodes))


@dataclass(frozen=True)
class edges(Credit):
    """Advantage of rows that are edges of a sampled tree: the value at the end of the edge minus that at its start.

    A node without children has its row's reward as its value, another node the mean of the values of its children::

        A(child) = V(child) - V(parent)
        A(child) = (V(child) - V(parent)) / (std(V of the children of the parent) + epsilon)        # with scale

    The standard deviation is that of the population. A change within the rounding of the rewards is exactly 0: at most
    8 times the machine epsilon of their dtype times the largest absolute value of the siblings. So children of equal
    values have no advantage, and of the float32 rewards .1, .3, 0, 0 the first has none, because .1 is their mean.

    Args:
        scale: Whether to divide by the standard deviation.
        epsilon: Added to the standard deviation, at least 0.

    References:
        arXiv 2505.23564.
    """

    scale: bool = flag(False)
    epsilon: float = number(1e-8, at_least=0)
    reads: ClassVar[frozenset[str]] = frozenset({"node_ids", "parent_ids"})

    def __call__(self, batch: Rollouts) -> Tensor:
        # Numbers of rows and groups only: on the host they take less time than the launches that they would be.
        groups = batch.group_index.cpu().numpy()
        nodes, parents = (batch.input(name).long().cpu().numpy() for name in ("node_ids", "parent_ids"))
        value: Numbers = batch.rewards.detach().double().cpu().numpy()
        rows = len(value)
        parents = _parents(groups, nodes, parents)
        # Siblings have their parent's number. Those below a prompt have one of their group.
        siblings = np.where(parents >= 0, parents, rows + groups)
        count = np.bincount(siblings, minlength=rows + batch.num_groups)
        inner, divisor = count[:rows] > 0, np.maximum(count, 1)
        mean: Numbers = np.bincount(siblings, value, len(count)) / divisor
        # Each round makes the values of one more level of inner nodes right, whose rewards are not read.
        ancestor, rounds = parents, 0
        while (ancestor >= 0).any():
            value = np.where(inner, mean[:rows], value)
            mean = np.bincount(siblings, value, len(count)) / divisor
            ancestor, rounds = np.where(ancestor >= 0, parents[ancestor], -1), rounds + 1
            if rounds > rows:
                raise ValueError("parent_ids: expected a tree, got a cycle")
        change = value - mean[siblings]
        size: Numbers = np.zeros(len(count))
        np.maximum.at(size, siblings, np.abs(value))
        change[np.abs(change) <= 8 * torch.finfo(batch.rewards.dtype).eps * size[siblings]] = 0
        if self.scale:
            squares = np.bincount(siblings, (value - mean[siblings]) ** 2, len(count))
            change /= np.sqrt(squares / divisor)[siblings] + self.epsilon
        return torch.from_numpy(change).to(batch.rewards)[:, None]


def spo_tree(
    below: float = 0.9,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    scale: bool = False,
    whiten: bool = False,
) -> Objective:
    """SPO-tree: PPO without a critic on the edges of a sampled tree; the advantage is the change of value over an edge.

    A row of the batch is an edge: the tokens of the path above it, which are masked, and its own tokens. A leaf has its
    reward as its value, an inner node the mean of the values of its children::

        A(child) = V(child) - V(parent)

    Edges with an advantage of 0 leave the batch, and only tokens to which the old policy gave a probability of less
    than ``below`` train.

    Args:
        below: Tokens with a smaller probability under the old policy train, from 0 to 1; the paper's rho.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        scale: Whether to divide by the population standard deviation of the values of the parent's children. It is the
            release's option ``grpo``, the default here its ``rloo``.
        whiten: Whether advantages are shifted and scaled to mean 0 and variance 1 over the tokens that train, as in the
            released code.

    Cost: One sampled tree per prompt (6 x 6 x 6 in the release), whose edges are both the training data and the
        estimate of the values.
    References: arXiv 2505.23564.
    Differences from the paper:
        - There is no KL term. The release adds 1e-4 times the mean over rows of the sum of k3 over tokens that train:
          ``tokcredit.mix("spo_tree", terms="kl(1e-4, limit=10000, aggregation=sequence_sum(1))")``.
    Differences from the released code:
        - Advantages are not whitened unless ``whiten`` is set.
        - A change within the rounding error of the values is 0. The release drops exact zeros only and so keeps edges
          for their rounding error.
        - The replay of edges of earlier iterations belongs to the trainer and is not done.
        - The optional best-of-k term (``use_pav``) is not offered.
        - The release skips a micro-batch whose mean ratio exceeds 10.
    """
    change: Credit = edges(scale)
    return Objective(
        whitened(change, below, nonzero=True) if whiten else change,
        filters=(filters.nonzero_advantage(), filters.improbable(below)),
        ratio=ratio.token(bound=10.0),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
