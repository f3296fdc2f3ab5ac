"""Multi-level aware preference learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.preference import Preference
from tokcredit.rollouts import Rollouts
from tokcredit.stages.base import number
from tokcredit.stages.link import logistic
from tokcredit.stages.pair import PairWeight


@dataclass(frozen=True)
class levels(PairWeight):
    """Weights of pairs of one response under two prompts, and of groups of four rows; other pairs have 1.

    Args:
        intra: Weight of a pair whose rows are marked in ``prompt_pairs``, at least 0.
        inter: Weight of a group of four, at least 0.

    Raises:
        ValueError: One row of a pair is marked, or a row of a group of four.
    """

    intra: float = number(1.0, at_least=0)
    inter: float = number(1.0, at_least=0)
    reads = frozenset({"prompt_pairs"})
    sizes: ClassVar[tuple[int, ...]] = (2, 4)

    def __call__(self, batch: Rollouts) -> Tensor:
        groups = batch.groups
        marked = batch.input("prompt_pairs").to(batch.rewards.dtype)
        intra = torch.zeros(groups.count, dtype=marked.dtype, device=marked.device).index_add_(0, groups.index, marked)
        if bool(((intra > 0) & ((intra != 2) | (groups.sizes != 2))).any()):
            raise ValueError(
                "prompt_pairs: expected True for both rows of a pair or for neither, and False in groups of four"
            )
        weights = torch.ones_like(intra).masked_fill_(intra > 0, self.intra)
        return weights.masked_fill_(groups.sizes == 4, self.inter)


def mapl(beta: float = 0.1, intra: float = 1.0, inter: float = 1.0) -> Preference:
    """MAPL: DPO on pairs of responses, on pairs of prompts, and on prompts that widen the difference of two responses.

    With ``R(x, y) = beta * sum over the tokens of y of log p - log p_ref`` the loss of each kind of group is::

        pair of responses        -log sigmoid(R(x, chosen) - R(x, rejected))
        one response y           -log sigmoid(R(x_chosen, y) - R(x_rejected, y)) * intra
        four rows                -log sigmoid(R(z, chosen) - R(z, rejected) - R(x, chosen) + R(x, rejected)) * inter

    In the second, the response satisfies the instructions of ``x_chosen`` and not those of ``x_rejected``; its rows are
    marked in ``prompt_pairs``. In the third, the instructions that z adds to x favour the chosen response; its rows
    (z, chosen) and (x, rejected) have the higher reward. The loss is the mean over all groups.

    Args:
        beta: Strength of the preference, above 0.
        intra: Weight of pairs of prompts, at least 0: the paper's lambda_1.
        inter: Weight of groups of four, at least 0: the paper's lambda_2.

    Cost: The same as DPO per row.
    References: arXiv 2505.12845; Rc-DPO, arXiv 2502.00814, for pairs of prompts.
    Differences from the paper:
        - The loss of four rows and the weights 1 are not verified; this is the recommended reading.
        - The paper's instructions are not known in full. Those of the trainer are about length, words, beginning and
          end.
        - The three losses have one denominator, the number of groups, so that a kind counts by its share of the batch.
    Differences from the released code:
        - There was none.
    """
    return Preference(link=logistic(beta), pair_weights=levels(intra, inter))
